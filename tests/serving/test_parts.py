"""The parts of `serve` that need no server: its health endpoint, its ports, its work folder, its launcher."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparse_export.errors import MissingCapability, UsageError
from sparse_export.serving import launch, process
from sparse_export.serving.health import Readiness, health_endpoint
from sparse_export.serving.process import free_ports, work_folder
from sparse_export.serving.server_files import ServerFiles, find_server
from sparse_export.serving.settings import HOST_CODE
from tests.serving.serving import get, until


def test_the_endpoint_tells_the_state_it_is_given() -> None:
    readiness = Readiness()
    with health_endpoint("127.0.0.1", 0, readiness) as port:
        for state, status in (("starting", 503), ("ready", 200), ("restarting", 503), ("draining", 503)):
            readiness.state = state
            assert get(port, "/ready") == (status, f'{{"state": "{state}"}}'.encode())
            assert get(port, "/live")[0] == 200
        assert get(port, "/other")[0] == 404


def test_the_endpoint_answers_beside_connections_that_say_nothing() -> None:
    with health_endpoint("127.0.0.1", 0, Readiness(state="ready")) as port:
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(30)]
        assert get(port, "/ready")[0] == 200
        for one in silent:
            one.close()


def test_the_endpoint_is_gone_after_its_block() -> None:
    with health_endpoint("127.0.0.1", 0, Readiness()) as port:
        pass
    with pytest.raises(ConnectionRefusedError):
        get(port, "/live")


def test_ports_of_zero_are_four_free_ones() -> None:
    ports = free_ports("127.0.0.1", http=0, grpc=0, metrics=0, health=0)
    assert len({ports.http, ports.grpc, ports.metrics, ports.health, 0}) == 5


def test_one_port_for_two_uses_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match="not all different"):
        free_ports("127.0.0.1", http=18000, grpc=18000, metrics=0, health=0)


def test_a_port_in_use_is_named_with_its_option() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(MissingCapability, match="--metrics-port"):
            free_ports("127.0.0.1", http=0, grpc=0, metrics=taken.getsockname()[1], health=0)


def test_a_host_that_is_no_address_of_this_machine_is_told() -> None:
    with pytest.raises((UsageError, MissingCapability), match="nowhere"):
        free_ports("nowhere.invalid", http=0, grpc=0, metrics=0, health=0)


def test_the_work_folder_is_private_and_goes_with_its_block() -> None:
    with work_folder() as folder:
        assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
        (folder.repository / "x").mkdir()
    assert not folder.path.exists()


def test_what_a_killed_one_left_is_swept_and_what_a_living_one_has_is_not() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = Path(f"/tmp/sparse-export-serve-{ended.pid}-left")
    mine = Path(f"/tmp/sparse-export-serve-{os.getpid()}-mine")
    for path in (left, mine):
        path.mkdir()
    try:
        with work_folder():
            assert (left.exists(), mine.exists()) == (False, True)
    finally:
        mine.rmdir()


def test_a_temporary_folder_that_a_shell_would_take_apart_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "a b; $(touch x)"
    odd.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(odd))
    with work_folder() as folder:
        assert folder.path.parent == Path("/tmp")


def test_executions_that_a_living_model_has_begun_and_not_ended_are_counted() -> None:
    with work_folder() as folder:
        (folder.activity / f"a-{os.getpid()}").write_bytes(
            (5).to_bytes(8, "little") + (3).to_bytes(8, "little")
        )
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        (folder.activity / f"b-{ended.pid}").write_bytes((9).to_bytes(8, "little") + bytes(8))
        assert folder.n_executing() == 2


def test_a_launched_program_does_not_outlive_its_parent(tmp_path: Path) -> None:
    file = str(tmp_path / "pid")
    program = f"""
import os, subprocess, sys, time
words = [sys.executable, "-I", "-S", {launch.__file__!r}, str(os.getpid()), "/bin/sleep", "300"]
with open({file!r} + ".new", "w") as stream:
    stream.write(str(subprocess.Popen(words).pid))
os.rename({file!r} + ".new", {file!r})
time.sleep(300)
"""
    parent = subprocess.Popen([sys.executable, "-c", program])
    until((tmp_path / "pid").exists, "the launched program")
    child = int((tmp_path / "pid").read_text())
    until(lambda: b"sleep" in Path(f"/proc/{child}/cmdline").read_bytes(), "its exec")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until(lambda: not Path(f"/proc/{child}").exists() or _is_zombie(child), "its end", 10)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_launched_program_whose_parent_is_gone_is_not_started() -> None:
    words = [sys.executable, "-I", "-S", launch.__file__, "1", "/bin/echo", "started"]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")


def test_a_server_on_path_is_taken_with_the_backends_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("tensorrt", "onnxruntime", "python"):
        (tmp_path / "backends" / name).mkdir(parents=True)
    binary = tmp_path / "bin" / "tritonserver"
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(binary.parent))
    server = find_server()
    assert (server.binary, server.is_wheel) == (binary, False)
    assert server.backends == {"tensorrt", "onnxruntime", "python"}


def test_the_wait_for_something_that_does_not_come_is_bounded() -> None:
    begin = time.monotonic()
    with pytest.raises(AssertionError, match="never"):
        until(lambda: False, "never", 0.2)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("host_code", [False, True])
def test_the_server_may_run_host_code_of_engines_only_where_that_is_wanted(
    host_code: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words: list[str] = []

    def popen(command: list[str], **_: object) -> SimpleNamespace:
        words.extend(command)
        return SimpleNamespace(pid=0)

    monkeypatch.setattr(process, "_can_limit_bodies", lambda server: False)
    monkeypatch.setattr("subprocess.Popen", popen)
    server = ServerFiles(
        binary=tmp_path, backends=frozenset(), backend_folder=tmp_path, libraries=(), is_wheel=False
    )
    with work_folder() as folder:
        ports = free_ports("127.0.0.1", http=0, grpc=0, metrics=0, health=0)
        process.start(server, folder, ports, host_code=host_code)
    assert (HOST_CODE in words) == host_code


@pytest.mark.parametrize(("of_user", "of_server"), [(None, "1"), ("0", "0")])
def test_the_server_gets_the_users_word_on_telemetry_or_none_is_sent(
    of_user: str | None, of_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environments: list[dict[str, str]] = []

    def popen(command: list[str], *, env: dict[str, str], **_: object) -> SimpleNamespace:
        environments.append(env)
        return SimpleNamespace(pid=0)

    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    if of_user is not None:
        monkeypatch.setenv("ORT_DISABLE_TELEMETRY", of_user)
    monkeypatch.setenv("SECRET", "of the user")
    monkeypatch.setattr(process, "_can_limit_bodies", lambda server: False)
    monkeypatch.setattr("subprocess.Popen", popen)
    server = ServerFiles(
        binary=tmp_path, backends=frozenset(), backend_folder=tmp_path, libraries=(), is_wheel=False
    )
    with work_folder() as folder:
        process.start(server, folder, free_ports("127.0.0.1", http=0, grpc=0, metrics=0, health=0))
    (environment,) = environments
    assert environment["ORT_DISABLE_TELEMETRY"] == of_server
    assert "SECRET" not in environment
