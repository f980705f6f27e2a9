"""A dask cluster that runs the cells of a sweep; the one module that imports dask.distributed.

A worker starts the same process for a cell that this machine would, in its own scratch folder. What it sends
back is the whole run folder, in one piece: a worker that is lost leaves nothing half, and dask gives its cell
to another one.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import signal
import tarfile
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_export.errors import MissingCapability, UsageError, how_to_get
from sparse_export.files import staged_folder, write_json
from sparse_export.sweep.places import Started, start_process
from sparse_export.version import __version__

__all__ = ["DaskPlace", "dask_cluster", "n_dask_threads", "run_remote"]

PREFIX = "dask:"
_CONNECT_S = 15.0
_WORKERS_S = 30.0  # for the first worker of a cluster that is starting
_LOOK_EVERY_S = 0.2
_ASK_EVERY_S = 2.0  # a worker asks the scheduler so often whether the sweep was stopped
_RETRIES = 3  # of a cell whose worker is lost


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What a worker sends back of a cell.

    Args:
        code: exit code of its process.
        log: what it said.
        run: the run folder as a tar file; empty where there is none.
    """

    code: int
    log: bytes
    run: bytes


@contextmanager
def dask_cluster(cluster: str) -> Iterator[DaskPlace]:
    """Connect to a scheduler that is running, and leave it running.

    Args:
        cluster: `dask:ADDRESS`, as in `dask:tcp://host:8786`.

    Raises:
        UsageError: it is no such text, the cluster has no workers, or another version of this program.
        MissingCapability: dask is not installed here or there, or no scheduler answers.
    """
    address = cluster.removeprefix(PREFIX)
    if not cluster.startswith(PREFIX) or not address:
        raise UsageError(f"The cluster is {cluster!r}.", expected="dask:ADDRESS of a scheduler was expected.")
    distributed = _distributed()
    try:
        client = distributed.Client(address, timeout=_CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as cause:
        raise MissingCapability(
            f"No dask scheduler answers at {address}: {cause}.",
            do="Start one with `dask scheduler`, and workers with `dask worker ADDRESS`.",
        ) from cause
    try:
        _require_able(client)
        yield DaskPlace(client)
    finally:
        client.close()


def _distributed() -> Any:
    try:
        return importlib.import_module("distributed")
    except ImportError as cause:
        raise MissingCapability("dask is not installed.", do=f"Install it: {how_to_get('dask')}.") from cause


def _require_able(client: Any) -> None:
    """Raise where a worker cannot run a cell as this machine would."""
    try:
        client.wait_for_workers(1, timeout=_WORKERS_S)
    except TimeoutError as cause:
        raise UsageError(
            "The cluster has no workers.", do="Start some with `dask worker ADDRESS`."
        ) from cause
    try:
        versions = client.run(_version)
    except Exception as cause:  # whatever a worker without this program raises
        raise MissingCapability(
            f"A worker of the cluster cannot import sparse_export: {cause}.",
            do="Install the same version of it on every worker.",
        ) from cause
    others = {worker: version for worker, version in versions.items() if version != __version__}
    if others:
        raise UsageError(
            f"The worker {next(iter(others))} has sparse_export {next(iter(others.values()))}, and this is "
            f"{__version__}.",
            do="Install the same version of it on every worker.",
        )


def _version() -> str:
    return __version__


def n_dask_threads(place: DaskPlace) -> int:
    """Tasks that the workers run at a time, at least 1."""
    return max(1, sum(int(n) for n in place.client.nthreads().values()))


class DaskPlace:
    """The workers of a cluster.

    Args:
        client: connected.
    """

    def __init__(self, client: Any) -> None:
        self.client = client
        self._stop = f"sparse-export-stop-{uuid.uuid4().hex}"

    def start(self, job: Mapping[str, Any], job_file: Path, log: Path, slot: int) -> Started:
        """See `sparse_export.sweep.places.Place.start`."""
        write_json(job_file, dict(job))
        begun = Path(job["out"])
        earlier = _packed(begun) if begun.is_dir() else b""
        future = self.client.submit(
            run_remote,
            dict(job),
            earlier,
            self._stop,
            pure=False,
            retries=_RETRIES,
            key=f"{begun.name}-{uuid.uuid4().hex}",
        )
        return _Remote(future, begun, log, self._ask_to_stop)

    def _ask_to_stop(self) -> None:
        _distributed().Event(self._stop, client=self.client).set()


class _Remote:
    def __init__(self, future: Any, out: Path, log: Path, ask: Any) -> None:
        self._future, self._out, self._log, self._ask = future, out, log, ask
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None and self._future.done():
            self._code = self._collected()
        return self._code

    def stop(self) -> None:
        if self._code is None:
            self._ask()

    def wait(self) -> None:
        while self.poll() is None:
            time.sleep(_LOOK_EVERY_S)

    def _collected(self) -> int:
        """Put what came back in its place; gives the exit code."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        try:
            ended = self._future.result()
        except Exception as cause:  # noqa: BLE001 - dask raises of all kinds for a task whose workers are lost
            with self._log.open("a") as log:
                log.write(f"The cluster lost it: {type(cause).__name__}: {' '.join(str(cause).split())}\n")
            return 1
        with self._log.open("ab") as log:
            log.write(ended.log)
        if ended.run:
            with staged_folder(self._out) as stage:
                _unpack(ended.run, stage)
        self._future.release()
        return int(ended.code)


def run_remote(job: Mapping[str, Any], earlier: bytes, stop_name: str) -> Ended:
    """Run a cell on a worker: the same process as on any machine, in a folder that is removed afterwards.

    Args:
        job: what `run_worker` is told.
        earlier: an unfinished run to go on with, as a tar file; empty for none.
        stop_name: of the event that asks for a stop.
    """
    distributed = _distributed()
    stop = distributed.Event(stop_name, client=distributed.get_client())
    scratch = distributed.get_worker().local_directory
    with tempfile.TemporaryDirectory(dir=scratch, prefix="sparse-export-") as name:
        folder = Path(name)
        out, log = folder / "run", folder / "log"
        if earlier:
            out.mkdir()
            _unpack(earlier, out)
        process = start_process({**job, "out": str(out)}, folder / "job.json", log, {})
        try:
            asked = time.monotonic()
            while process.poll() is None:
                time.sleep(_LOOK_EVERY_S)
                if time.monotonic() - asked > _ASK_EVERY_S:
                    asked = time.monotonic()
                    if stop.is_set():
                        process.send_signal(signal.SIGTERM)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            process.wait()
        return Ended(code=process.returncode, log=log.read_bytes(), run=_packed(out) if out.is_dir() else b"")


def _packed(folder: Path) -> bytes:
    """A folder as a tar file."""
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as archive:
        archive.add(folder, arcname=".")
    return held.getvalue()


def _unpack(packed: bytes, folder: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
