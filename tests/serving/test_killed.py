"""`serve` that is killed at one of its file operations: no process stays, and the next one serves."""

from __future__ import annotations

import os
import signal
import tempfile
from functools import partial
from pathlib import Path

import pytest

from sparse_export.serving.process import Ports
from sparse_export.serving.supervise import Loaded, ServeOptions, serve
from tests.killing import Command, killed, processes_that_name
from tests.serving.conftest import Bundles

_PLACES = (Path(tempfile.gettempdir()), Path("/dev/shm"))


def _served(bundle: Path, out: Path) -> None:
    """Serve until the golden answer is right, with the log in a file, then end as on SIGTERM."""
    out.mkdir(exist_ok=True)

    def log(line: str) -> None:
        with (out / "log").open("a") as stream:
            stream.write(f"{line}\n")

    def ready(ports: Ports, server: int, models: tuple[Loaded, ...]) -> None:
        (out / "ready").write_text(" ".join(f"{one.name} {one.manifest_sha256}" for one in models))
        os.kill(os.getpid(), signal.SIGTERM)

    options = ServeOptions(http_port=0, grpc_port=0, metrics_port=0, health_port=0)
    assert serve([bundle], [None], options, say=log, on_ready=ready) == 0


def _state(out: Path) -> str:
    return (out / "ready").read_text() if (out / "ready").is_file() else ""


def _left(pid: int, _: Path) -> list[str]:
    return [str(path) for place in _PLACES for path in place.glob(f"sparse-export-serve-{pid}-*")]


def _orphans(pid: int, _: Path) -> list[str]:
    """The server and the processes of its models name the folder that `serve` made for them."""
    return processes_that_name(f"sparse-export-serve-{pid}-")


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_serve_that_is_killed_leaves_no_process_and_the_next_one_serves(
    server: Path, bundles: Bundles, tmp_path: Path
) -> None:
    command = Command(partial(_served, bundles.dense), _state, left=_left, orphans=_orphans)
    assert killed(command, tmp_path, 8) >= 7
