"""What `serve` does when something goes wrong: with the server, with a bundle, with itself."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from onnx import helper

from sparse_export.cli.main import cli
from sparse_export.formats.bundle import BUNDLE_FILE
from sparse_export.signature import Signature, TensorInfo
from tests.named_graphs import model_of
from tests.sealing import write_sealed
from tests.serving.conftest import Bundles
from tests.serving.named_bundles import named_bundle
from tests.serving.serving import ANY_PORTS, CHECKOUT, Load, Serving, get, group, serving, until


def _serve(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A `serve` that is expected to end by itself."""
    return subprocess.run(
        [sys.executable, "-m", "sparse_export", "serve", *map(str, words), "--json"],
        check=False,
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        env={**os.environ, **environment},
        timeout=120,
    )


def _refused(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A `serve` that starts no server, in this process."""
    line = ["serve", *map(str, words), "--json"]
    done = CliRunner().invoke(cli, line, prog_name="sparse-export", env=environment)
    return subprocess.CompletedProcess(line, done.exit_code, done.stdout, done.stderr)


def _error(done: subprocess.CompletedProcess[str]) -> str:
    message: str = json.loads(done.stdout)["error"]["message"]
    return message


def _left_over(pid: int) -> list[Path]:
    return [
        path
        for folder in (Path("/tmp"), Path("/dev/shm"))
        for path in folder.glob(f"sparse-export-serve-{pid}-*")
    ]


@pytest.fixture
def sample(bundles: Bundles) -> np.ndarray:
    x: np.ndarray = np.load(bundles.dense / "golden" / "input.npy")[:1]
    return x


@pytest.fixture
def answer(bundles: Bundles) -> np.ndarray:
    y: np.ndarray = np.load(bundles.dense / "golden" / "output.npy")[:1]
    return y


def test_a_server_that_is_killed_under_load_is_started_again_and_checked_again(
    server: Path, bundles: Bundles, sample: np.ndarray, answer: np.ndarray, tmp_path: Path
) -> None:
    with serving(bundles.dense, "--restarts", 1, log=tmp_path / "log") as one:
        first = one.server_pid()
        with Load(one, "dense", sample, clients=4, wanted=answer) as load:
            until(lambda: load.n_answered > 50, "answers")
            os.kill(first, signal.SIGKILL)
            until(lambda: one.health()[0] == 503, "not ready")
            one.wait_for("ready again")
            assert one.health() == (200, "ready")
            before = load.n_answered
            until(lambda: load.n_answered > before + 50, "answers of the new server")
        assert group(first) == []
        assert "tritonserver was ended by SIGKILL: started again, time 1 in five minutes" in one.log
        assert one.log.count("golden answer right") == 2
        assert not [error for error in load.errors if "wrong answer" in error]
        for n in (2, 3):  # more often than --restarts, which counts starts that fail
            os.kill(one.server_pid(), signal.SIGKILL)
            one.wait_for("ready again", times=n)
        assert "giving up" not in one.log
    assert _left_over(one.process.pid) == []


def test_a_server_that_dies_as_it_starts_is_given_up(server: Path, bundles: Bundles, tmp_path: Path) -> None:
    with serving(bundles.dense, "--restarts", 1, log=tmp_path / "log") as one:
        killed: set[int] = set()
        while one.process.poll() is None:
            with contextlib.suppress(StopIteration, IndexError, OSError, AssertionError):
                pid = one.server_pid()
                if pid not in killed:
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
            time.sleep(0.02)
        assert one.process.wait(60) == 128 + signal.SIGKILL
        assert "2 starts in five minutes failed: giving up" in one.log
    assert _left_over(one.process.pid) == []


def test_a_model_whose_process_is_killed_is_not_ready_until_it_answers_again(
    server: Path, bundles: Bundles, sample: np.ndarray, answer: np.ndarray, tmp_path: Path
) -> None:
    """Before, `/ready` said 200 while every request failed: the kernel kills the largest process first."""
    with serving(bundles.dense, log=tmp_path / "log") as one:
        pid = one.server_pid()
        listed = [
            child
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
        models = [child for child in listed if "/dense/1/" in Path(f"/proc/{child}/cmdline").read_text()]
        assert models  # one for each instance of the model
        for child in models:
            os.kill(int(child), signal.SIGKILL)
        begin = time.monotonic()
        until(lambda: one.health()[0] == 503, "not ready")
        one.wait_for("ready again")
        assert time.monotonic() - begin < 10
        assert "dense: a process of the model ended" in one.log
        with Load(one, "dense", sample, clients=1, wanted=answer) as load:
            until(lambda: load.n_answered > 5, "answers")
        assert not load.errors


def test_sigterm_under_load_loses_no_request_of_clients_that_heed_readiness(
    server: Path, bundles: Bundles, sample: np.ndarray, answer: np.ndarray, tmp_path: Path
) -> None:
    with serving(bundles.dense, log=tmp_path / "log") as one:
        leader = one.server_pid()

        def heed() -> bool:
            try:
                return one.health()[0] == 200
            except OSError:
                return False

        with Load(one, "dense", sample, clients=8, heed=heed, wanted=answer) as load:
            until(lambda: load.n_answered > 100, "answers")
            one.process.send_signal(signal.SIGTERM)
            load.join()
        assert load.errors == []
        assert one.process.wait(60) == 0
        assert "drained after" in one.log
    assert group(leader) == []
    assert _left_over(one.process.pid) == []


def test_a_drain_ends_at_its_limit_although_clients_go_on(
    server: Path, bundles: Bundles, sample: np.ndarray, tmp_path: Path
) -> None:
    with serving(bundles.dense, "--drain", 1, log=tmp_path / "log") as one:
        leader = one.server_pid()
        with Load(one, "dense", sample, clients=4) as load:
            until(lambda: load.n_answered > 20, "answers")
            code = one.end()
    assert "the drain limit of 1 s is over" in one.log
    # Of Triton's own making: 1 where it waited in vain for connections to close, and with requests in flight
    # a crash now and then (in 1 of 4 runs, 2.51).
    how = (
        "tritonserver was ended by SIGSEGV"
        if code == 128 + signal.SIGSEGV
        else f"tritonserver ended with {code}"
    )
    assert how in one.log
    assert group(leader) == []


def test_sigkill_of_serve_leaves_no_process(server: Path, bundles: Bundles, tmp_path: Path) -> None:
    with serving(bundles.dense, log=tmp_path / "log") as one:
        leader = one.server_pid()
        assert len(group(leader)) >= 2
        one.process.kill()
        one.process.wait()
        until(lambda: group(leader) == [], "the end of every process of the server", 20.0)


@pytest.fixture(scope="module")
def renewed(server: Path, bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Serving:  # type: ignore[misc]
    """`serve` on a link to the dense bundle, which tests point elsewhere."""
    folder = tmp_path_factory.mktemp("renewed")
    (folder / "current").symlink_to(bundles.dense)
    with serving(folder / "current", "--name", "net", log=folder / "log") as one:
        yield one


def _point(one: Serving, to: Path) -> None:
    link = one.log_path.parent / "current"
    link.unlink()
    link.symlink_to(to)
    one.process.send_signal(signal.SIGHUP)


def test_a_new_version_is_loaded_under_load_without_an_error(
    renewed: Serving, bundles: Bundles, sample: np.ndarray
) -> None:
    with Load(renewed, "net", sample, clients=6) as load:
        until(lambda: load.n_answered > 50, "answers")
        _point(renewed, bundles.other)
        renewed.wait_for("net version 2 by python: golden answer right")
        before = load.n_answered
        until(lambda: load.n_answered > before + 50, "answers of the new version")
        _point(renewed, bundles.dense)
        renewed.wait_for("net version 3 by python: golden answer right")
        time.sleep(2)  # the old version is unloaded meanwhile
    assert load.errors == []
    from tritonclient import http

    from tests.serving.serving import infer

    with http.InferenceServerClient(f"127.0.0.1:{renewed.http_port}") as client:
        found = infer(http, client, "net", sample)
    assert np.allclose(found, np.load(bundles.dense / "golden" / "output.npy")[:1], atol=1e-4)
    until(
        lambda: _series_of(renewed, "net.candidate") == {"nv_inference_request_failure"}, "the end of counts"
    )


def _series_of(one: Serving, model: str) -> set[str]:
    """Names on the page of metrics."""
    _, page = get(int(one.document["ports"]["metrics"]), "/metrics")
    return {line.partition("{")[0] for line in page.decode().splitlines() if f'model="{model}"' in line}


def test_a_damaged_new_bundle_leaves_the_old_version_in_place(
    renewed: Serving, bundles: Bundles, sample: np.ndarray, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(bundles.other, damaged)
    (damaged / "model.onnx").write_bytes(b"x" * (damaged / "model.onnx").stat().st_size)
    with Load(renewed, "net", sample, clients=2) as load:
        _point(renewed, damaged)
        renewed.wait_for("stays. ")
    assert load.errors == []
    assert renewed.health() == (200, "ready")
    assert "SHA-256 differs" in renewed.log


def test_an_unchanged_bundle_is_not_loaded_again(renewed: Serving, bundles: Bundles) -> None:
    _point(renewed, bundles.dense)
    renewed.wait_for("net: unchanged")
    assert "net version 4" not in renewed.log


def test_a_golden_answer_that_is_wrong_is_never_ready(server: Path, bundles: Bundles, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(bundles.dense, wrong)
    manifest = json.loads((wrong / BUNDLE_FILE).read_text())
    shutil.copyfile(bundles.other / "golden" / "output.npy", wrong / "golden" / "output.npy")
    other = json.loads((bundles.other / BUNDLE_FILE).read_text())
    manifest["files"]["golden/output.npy"] = other["files"]["golden/output.npy"]
    write_sealed(wrong / BUNDLE_FILE, manifest)
    done = _serve(wrong, *ANY_PORTS)
    assert done.returncode == 3
    assert "answer to the golden input of wrong differs by" in _error(done)


def test_samples_that_look_at_each_other_are_not_merged(server: Path, tmp_path: Path) -> None:
    """Its first axis is that of time, say, though it is called batch."""
    signature = Signature(
        inputs=(TensorInfo(name="x", dtype="float32", shape=("batch", 3)),),
        outputs=(TensorInfo(name="y", dtype="float32", shape=("batch", 3)),),
    )
    nodes = [
        helper.make_node("ReduceMean", ["x", "first"], ["mean"]),
        helper.make_node("Sub", ["x", "mean"], ["y"]),
    ]
    bundle = named_bundle(tmp_path / "mixed", model_of(signature, nodes, {"first": np.array([0])}), signature)
    done = _serve(bundle, *ANY_PORTS)
    assert done.returncode == 3
    assert "y of a sample of mixed is another one alone than beside others" in _error(done)
    with serving(bundle, "--no-batching", log=tmp_path / "log") as one:
        assert [model["name"] for model in one.document["models"]] == ["mixed"]


def test_a_port_in_use_is_told_with_its_option(server: Path, bundles: Bundles) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = _serve(bundles.dense, *ANY_PORTS, "--grpc-port", port)
    assert done.returncode == 5
    assert f"Port {port} on 127.0.0.1 cannot be used" in _error(done)
    assert "--grpc-port" in _error(done)


def test_without_a_server_it_is_told_how_to_install_one(bundles: Bundles, tmp_path: Path) -> None:
    done = _refused(bundles.dense, *ANY_PORTS, XDG_DATA_HOME=str(tmp_path), PATH=str(tmp_path))
    assert done.returncode == 5
    assert "--install-server" in _error(done)


def test_a_bundle_that_is_not_there_is_wrong_usage(server: Path, tmp_path: Path) -> None:
    done = _refused(tmp_path / "nothing", *ANY_PORTS)
    assert (done.returncode, "does not exist" in _error(done)) == (2, True)


@pytest.mark.parametrize("file", ["model.onnx", "golden/input.npy", "layers.json"])
def test_a_bundle_that_was_changed_is_not_served(
    file: str, server: Path, bundles: Bundles, tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(bundles.dense, changed)
    content = bytearray((changed / file).read_bytes())
    content[-1] ^= 1
    (changed / file).write_bytes(content)
    done = _refused(changed, *ANY_PORTS)
    assert (done.returncode, "SHA-256 differs" in _error(done)) == (6, True)


def test_two_bundles_of_one_name_are_wrong_usage(server: Path, bundles: Bundles) -> None:
    done = _refused(bundles.dense, bundles.sparse, "--name", "x", "--name", "x", *ANY_PORTS)
    assert (done.returncode, "'x'" in _error(done)) == (2, True)


def test_a_runtime_that_the_server_has_not_is_told(server: Path, bundles: Bundles) -> None:
    done = _refused(bundles.dense, "--runtime", "onnxruntime", *ANY_PORTS)
    assert (done.returncode, "it has python" in _error(done)) == (5, True)
