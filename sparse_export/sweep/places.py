"""Where the cells of a sweep run: each in a process of its own, on this machine or elsewhere."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from sparse_export import child
from sparse_export.files import write_json

__all__ = ["Here", "Place", "Started", "cuda_devices", "start_process"]


class Started(Protocol):
    """A cell under way."""

    def poll(self) -> int | None:
        """The exit code of its process; None while it runs. With a code its run and its log are in place."""

    def stop(self) -> None:
        """Ask it to save and end."""

    def wait(self) -> None:
        """Wait until it has ended, and its run is in place."""


class Place(Protocol):
    """Runs cells."""

    def start(self, job: Mapping[str, Any], job_file: Path, log: Path, slot: int) -> Started:
        """Start a cell.

        Args:
            job: what `run_worker` is told, but for its parent; `out` is the folder on this machine where the
                run is to be in the end.
            job_file, log: on this machine, to be written, and to be appended to.
            slot: number of the cell among those that run at once, from 0.
        """


class Here:
    """This machine.

    Args:
        device: as a sweep takes it.
    """

    def __init__(self, device: str) -> None:
        self._device = device

    def start(self, job: Mapping[str, Any], job_file: Path, log: Path, slot: int) -> Started:
        """See `Place.start`."""
        return _ProcessHere(start_process(job, job_file, log, _device_of(slot, self._device)))


class _ProcessHere:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def poll(self) -> int | None:
        return self._process.poll()

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        self._process.wait()


def start_process(
    job: Mapping[str, Any], job_file: Path, log: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start the process of a cell, a child of this one.

    Args:
        job: what `run_worker` is told, but for its parent.
        job_file, log: to be written, and to be appended to.
        environment: variables in place of this process's own.
    """
    write_json(job_file, {**job, "parent": os.getpid()})
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "sparse_export.sweep.run_worker", str(job_file)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**child.environment(), **environment},
            start_new_session=True,  # Ctrl-C is for the sweep, which passes it on once
        )


def cuda_devices() -> int:
    """CUDA devices of this machine."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _device_of(slot: int, device: str) -> dict[str, str]:
    """The one CUDA device that a process of this slot sees."""
    if device == "cpu" or not (n_devices := cuda_devices()):
        return {}
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name for name in seen.split(",") if name] if seen else [str(n) for n in range(n_devices)]
    return {"CUDA_VISIBLE_DEVICES": names[slot % len(names)]}
