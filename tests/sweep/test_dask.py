"""A sweep on a dask cluster: workers that are lost, a stop, and clusters that cannot do it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparse_export.errors import Interrupted, MissingCapability, UsageError
from sparse_export.formats.run import read_run_info
from sparse_export.sweep import dask_place
from sparse_export.sweep.sweep import sweep
from sparse_export.version import __version__

pytest.importorskip("distributed", reason="dask is not installed: pip install 'sparse-export[dask]'")

CHECKOUT = Path(__file__).parents[2]
GRID = 'recipe = "digits"\nmethods = ["set", "rigl"]\ndensities = [0.1]\nseeds = [0, 1]\nchanges = { epochs = 2 }\n'


class Cluster:
    """A scheduler and workers, each a process of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        file = folder / "scheduler.json"
        self._start("scheduler", "--port", "0", "--host", "127.0.0.1", "--scheduler-file", str(file))
        self.address = ""
        while not self.address:
            time.sleep(0.05)
            assert self.processes[0].poll() is None
            if file.is_file() and file.read_text():
                self.address = json.loads(file.read_text())["address"]

    def worker(self) -> subprocess.Popen[bytes]:
        place = self._folder / f"worker-{len(self.processes)}"
        return self._start(
            "worker",
            self.address,
            *("--nthreads", "1", "--no-nanny", "--memory-limit", "0", "--local-directory", str(place)),
        )

    def _start(self, kind: str, *words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "distributed.cli.dask_" + kind, "--no-dashboard", *words]
        with (self._folder / f"{kind}-{len(self.processes)}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=CHECKOUT,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(CHECKOUT), "PYTHONWARNINGS": "ignore"},
            )
        self.processes.append(process)
        return process

    def wait_for(self, n_workers: int) -> None:
        distributed = pytest.importorskip("distributed")
        with distributed.Client(self.address, set_as_default=False) as client:
            client.wait_for_workers(n_workers, timeout=120)

    def close(self) -> None:
        for process in reversed(self.processes):
            process.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    found = Cluster(tmp_path)
    yield found
    found.close()


def weights(folder: Path) -> dict[str, bytes]:
    return {
        f"{file.parent.name}/{file.name}": file.read_bytes()
        for pattern in ("model.safetensors", "masks.safetensors")
        for file in sorted(folder.glob(f"runs/*/{pattern}"))
    }


@pytest.mark.slow
@pytest.mark.full
def test_cells_of_a_lost_worker_run_on_another_and_have_the_bits_of_this_machine(
    tmp_path: Path, cluster: Cluster
) -> None:
    grid = tmp_path / "grid.toml"
    grid.write_text(GRID)
    workers = [cluster.worker(), cluster.worker()]
    cluster.wait_for(2)
    killed = threading.Event()

    def kill_one() -> None:
        """While it runs a cell: its process says so in a job file in the worker's folder."""
        place = tmp_path / "worker-1"
        while not list(place.glob("**/run/metrics.jsonl")):
            time.sleep(0.02)
        workers[0].kill()
        killed.set()

    threading.Thread(target=kill_one, daemon=True).start()
    result = sweep(grid, tmp_path / "there", cluster=f"dask:{cluster.address}", device="cpu")
    assert killed.is_set()
    assert workers[0].wait() == -signal.SIGKILL
    assert [one.status for one in result.findings] == ["complete"] * 4
    here = sweep(grid, tmp_path / "here", n_jobs=2, device="cpu")
    assert [one.cell.name for one in here.findings] == [one.cell.name for one in result.findings]
    assert weights(tmp_path / "there") == weights(tmp_path / "here")
    assert len(weights(tmp_path / "here")) == 8
    for one in result.findings:
        assert read_run_info(one.run).status == "complete"
        assert (one.run / "metrics.jsonl").read_text().count("\n") == 2
        assert (tmp_path / "there" / "logs" / f"{one.cell.name}.log").read_text().count("epoch ") == 2


@pytest.mark.slow
@pytest.mark.full
def test_a_stop_brings_the_unfinished_cell_back_and_it_goes_on_anywhere(
    tmp_path: Path, cluster: Cluster
) -> None:
    grid, out = tmp_path / "grid.toml", tmp_path / "out"
    grid.write_text('recipe = "digits"\nmethods = ["set"]\ndensities = [0.1]\nchanges = { epochs = 25 }\n')
    cluster.worker()
    cluster.wait_for(1)

    def stop() -> None:
        files = (tmp_path / "worker-1").glob
        while not any(file.stat().st_size for file in files("**/run/metrics.jsonl")):  # an epoch is done
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(Interrupted):
        sweep(grid, out, cluster=f"dask:{cluster.address}", device="cpu")
    (run,) = out.glob("runs/*")
    assert read_run_info(run).status == "running"
    assert (run / "metrics.jsonl").read_bytes()
    sweep(grid, out, n_jobs=1, device="cpu")
    sweep(grid, tmp_path / "whole", n_jobs=1, device="cpu")
    assert weights(out) == weights(tmp_path / "whole")


def test_a_cluster_without_workers_is_refused(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dask_place, "_WORKERS_S", 0.5)
    grid = tmp_path / "grid.toml"
    grid.write_text(GRID)
    with pytest.raises(UsageError, match="has no workers"):
        sweep(grid, tmp_path / "out", cluster=f"dask:{cluster.address}", device="cpu")


def test_an_address_where_nobody_answers_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_place, "_CONNECT_S", 0.5)
    grid = tmp_path / "grid.toml"
    grid.write_text(GRID)
    with pytest.raises(MissingCapability, match=r"No dask scheduler answers at tcp://127\.0\.0\.1:1"):
        sweep(grid, tmp_path / "out", cluster="dask:tcp://127.0.0.1:1", device="cpu")
    for text in ("ray:host", "dask:", "host"):
        with pytest.raises(UsageError, match="dask:ADDRESS"):
            sweep(grid, tmp_path / "out", cluster=text, device="cpu")


def test_workers_of_another_version_are_refused() -> None:
    class Client:
        def wait_for_workers(self, n: int, timeout: float) -> None:
            """They are there."""

        def run(self, function: Any) -> dict[str, str]:
            return {"tcp://a": __version__, "tcp://b": "0.0.1"}

    with pytest.raises(UsageError, match=r"tcp://b has sparse_export 0\.0\.1"):
        dask_place._require_able(Client())


def test_without_dask_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with (
        pytest.raises(MissingCapability, match="dask is not installed"),
        dask_place.dask_cluster("dask:tcp://a:1"),
    ):
        pass
