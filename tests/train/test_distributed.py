"""Several processes that train one network together, started by torchrun as a user would."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sparse_export as se
from sparse_export.errors import UsageError
from sparse_export.train.distributed import (
    ALONE,
    Agreement,
    World,
    masks_sha256,
    others_reachable,
    torchrun_world_size,
)
from sparse_export.train.loop import train
from sparse_export.train.recipe import load_recipe
from tests.sealing import write_sealed

CHECKOUT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("torchrun_worker.py")


@pytest.fixture(autouse=True)
def _outside_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_RESTART_COUNT",
    ):
        monkeypatch.delenv(name, raising=False)


def launched(*words: str, n: int = 2) -> subprocess.Popen[str]:
    """torchrun in a session of its own, so that whatever happens all of it can be ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={n}"),
            *("--master-addr=127.0.0.1", f"--master-port={port}", *words),
        ],
        cwd=CHECKOUT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finished(process: subprocess.Popen[str], timeout_s: float = 300) -> tuple[int, str, str]:
    """Exit code, stdout, stderr; nothing is left running."""
    try:
        out, err = process.communicate(timeout=timeout_s)
        return process.returncode, out, err
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def course(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    """The first layers see the same batch in either case, so all that differs is rounding and batch norm."""
    words = ("train", "digits", "--epochs", "6", "--device", "cpu", "--json", "--out")
    code, out, err = finished(launched("-m", "sparse_export", *words, str(tmp_path / "two")))
    assert code == 0, err
    document = json.loads(out)  # one document: the other process says nothing
    assert (document["processes"], document["steps"]) == (2, 6 * (1257 // 64))
    one = train(load_recipe("digits", changes={"epochs": 6}), tmp_path / "one", device="cpu")
    two = se.open_run(tmp_path / "two")
    assert one.info.test is not None
    assert two.info.test is not None
    assert abs(one.info.test.figure - two.info.test.figure) < 2.0  # 8 of 400 pictures
    assert two.info.n_active == one.info.n_active
    assert [line["train_loss"] for line in course(two.path)] == pytest.approx(
        [line["train_loss"] for line in course(one.path)], rel=0.2
    )
    assert course(two.path)[-1]["masks_sha256"] == masks_sha256(load_file(two.path / "masks.safetensors"))


@pytest.mark.slow
@pytest.mark.full
def test_two_processes_reach_what_one_reaches_on_mnist(mnist_dir: Path, tmp_path: Path) -> None:
    words = ("train", "mnist-lenet300-100", "--epochs", "2", "--device", "cpu", "--data-dir", str(mnist_dir))
    code, _, err = finished(launched("-m", "sparse_export", *words, "--out", str(tmp_path / "two")))
    assert code == 0, err
    recipe = load_recipe("mnist-lenet300-100", changes={"epochs": 2})
    one = train(recipe, tmp_path / "one", data_dir=mnist_dir, device="cpu")
    two = se.open_run(tmp_path / "two")
    assert one.info.test is not None
    assert two.info.test is not None
    assert abs(one.info.test.figure - two.info.test.figure) < 0.4
    # Without batch norm the sums differ by rounding alone.
    assert course(two.path)[0]["train_loss"] == pytest.approx(course(one.path)[0]["train_loss"], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.full), 1])
def test_a_killed_process_ends_the_others_with_a_reason_and_one_process_goes_on(
    victim: int, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    code, _, err = finished(launched(str(WORKER), "killed", str(run), str(victim), "45"))
    assert code != 0
    assert f"rank {1 - victim}: ProcessLost: Another process of this training ended" in err
    assert f"Go on with: sparse-export train --resume --out {run}" in err
    assert json.loads((run / "run.json").read_text())["status"] == "running"
    resumed = train(None, run, resume=True)
    assert resumed.info.n_processes == 1
    assert resumed.info.test is not None
    assert resumed.info.test.figure > 60
    assert [line["epoch"] for line in course(run)] == [1, 2, 3]


@pytest.mark.slow
def test_masks_that_differ_are_an_error_in_every_process(tmp_path: Path) -> None:
    code, _, err = finished(launched(str(WORKER), "diverged", str(tmp_path / "run")))
    assert code != 0
    assert "RanksDiverged: The masks of rank 1 differ from those of rank 0" in err


@pytest.mark.slow
@pytest.mark.full
def test_a_signal_stops_all_processes_after_one_step_and_two_others_go_on(tmp_path: Path) -> None:
    run, marker = tmp_path / "run", tmp_path / "under way"
    process = launched(str(WORKER), "long", str(run), str(marker))
    try:
        deadline = time.monotonic() + 200
        while not marker.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
    finally:
        code, _, err = finished(process)
    assert code != 0
    stops = re.findall(r"rank (\d): Interrupted: Stopped after step (\d+) of 570", err)
    assert sorted(rank for rank, _ in stops) == ["0", "1"], err
    assert len({step for _, step in stops}) == 1
    # On with two processes, which were given nothing but the folder; shortened, for the test's sake.
    document = json.loads((run / "run.json").read_text())
    assert document["recipe"]["epochs"] == 30
    document["recipe"]["epochs"] = 3
    write_sealed(run / "run.json", document)
    words = ("train", "--resume", "--out", str(run))
    code, _, err = finished(launched("-m", "sparse_export", *words))
    assert code == 0, err
    assert f"from step {stops[0][1]}" in err
    assert len(course(run)) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "masked"),
    [
        pytest.param("", ["0.weight", "2.weight"], marks=pytest.mark.full, id="no-pattern"),
        pytest.param("2:4", ["0.weight"], id="2:4"),
    ],
)
def test_a_users_own_loop_around_ddp_gets_one_mask_in_all_processes(
    pattern: str, masked: list[str], tmp_path: Path
) -> None:
    code, _, err = finished(launched(str(WORKER), "user_loop", str(tmp_path / "said"), pattern))
    assert code == 0, err
    n_updates, now, checked, *names = (tmp_path / "said").read_text().split()
    assert (int(n_updates), names) == (3, masked)
    assert now == checked


@pytest.mark.slow
def test_shares_of_a_batch_in_parts_have_the_gradients_of_the_whole_batch() -> None:
    code, _, err = finished(launched(str(WORKER), "parts"))
    assert code == 0, err


@pytest.mark.slow
def test_processes_that_torchrun_starts_anew_resume_by_themselves(tmp_path: Path) -> None:
    """The state of the run is what the first attempt left; a fresh start would find the folder taken."""
    from tests.train.test_loop import small

    class StopAtStep:
        def started(self, *_: object) -> None: ...

        def finished_epoch(self, *_: object) -> None: ...

        def stepped(self, step: int, loss: torch.Tensor) -> None:
            if step == 25:
                os.kill(os.getpid(), signal.SIGTERM)

    run = tmp_path / "run"
    with pytest.raises(se.SparseExportError, match="Stopped after step 25"):
        train(small(), run, device="cpu", observer=StopAtStep())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        resumed = train(small(), run, device="cpu")
    assert resumed.info.status == "complete"
    assert len(course(run)) == 3


def test_shares_of_a_batch_are_even_and_whole() -> None:
    rows = torch.arange(10)
    parts = [World(rank=rank, size=4).share(rows) for rank in range(4)]
    assert [len(part) for part in parts] == [3, 3, 2, 2]
    assert torch.equal(torch.cat(parts), rows)
    assert ALONE.share(rows) is rows


def test_alone_everything_is_agreed_at_once() -> None:
    agreed = Agreement(ALONE).exchange(stop=True, save=False, loss=2.5)
    assert (agreed.stop, agreed.save, agreed.loss) == (True, False, 2.5)
    assert ALONE.sum([1.5]) == [1.5]


def test_the_hash_of_masks_hangs_on_every_bit_and_on_names_and_shapes() -> None:
    mask = torch.rand(5, 7) < 0.5
    other = mask.clone()
    other[4, 6] ^= True
    digests = {
        masks_sha256({"a": mask}),
        masks_sha256({"a": other}),
        masks_sha256({"b": mask}),
        masks_sha256({"a": mask.T.contiguous()}),
        masks_sha256({"a": mask.view(7, 5)}),
    }
    assert len(digests) == 5
    assert masks_sha256({"a": mask.t().contiguous().t()}) == masks_sha256(
        {"a": mask}
    )  # memory order is no matter


@pytest.mark.parametrize("text", ["two", "-1", "0", ""])
def test_a_world_size_that_is_no_number_is_told(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(UsageError, match=f"WORLD_SIZE='{text}'"):
        torchrun_world_size()


def test_half_of_torchruns_variables_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="RANK, MASTER_ADDR, MASTER_PORT is not set"):
        train("digits", tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_other_runtime_errors_pass_through_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"), others_reachable():
        torch.ones(2, 3) @ torch.ones(2, 3)


@pytest.fixture
def lonely_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one, as a user's script may have it without torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_group_of_the_callers_own_is_used_and_left_open(lonely_group: None, tmp_path: Path) -> None:
    run = train(load_recipe("digits", changes={"epochs": 1}), tmp_path / "run", device="cpu")
    assert run.info.n_processes == 1
    assert torch.distributed.is_initialized()
