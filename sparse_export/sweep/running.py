"""Runs the cells of a grid side by side, each in a process of its own, and goes on where it was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_export.errors import MissingCapability
from sparse_export.instruments.machine import n_usable_cores
from sparse_export.sweep.earlier import complete_recipe, complete_runs, is_complete_call
from sparse_export.sweep.places import Here, Place, Started, cuda_devices
from sparse_export.sweep.run_list import VERSION, Cell, essence
from sparse_export.train.recipe import Recipe
from sparse_export.train.stopping import Stop, stop_signals

_LOOK_EVERY_S = 0.1
# Of lack of a data set, a device or a library: every other cell would end alike.
_HOPELESS = MissingCapability.exit_code


@dataclass(frozen=True, kw_only=True)
class Finding:
    """How a cell stands.

    status: `complete`, `failed`, or `waiting`.  reason, exit_code: the last words of one that failed.
    """

    cell: Cell
    run: Path
    status: str
    reason: str = ""
    exit_code: int = 0


@dataclass(kw_only=True)
class _Job:
    cell: Cell
    started: Started
    log: Path
    slot: int


def run_folder(folder: Path, cell: Cell) -> Path:
    return folder / "runs" / cell.name


def run_of(cell: Cell, folder: Path, earlier: Mapping[Recipe, Path]) -> tuple[Path, bool]:
    """The run that is or will be this cell's, and: is it complete?

    earlier: see `complete_runs`; one of them stands for a cell of the same recipe, whatever its folder is
    called.
    """
    own = run_folder(folder, cell)
    if not isinstance(cell.by, Recipe):
        return own, is_complete_call(own, cell)
    recipe = essence(cell.recipe)
    if complete_recipe(own) == recipe:
        return own, True
    found = earlier.get(recipe)
    return (own, False) if found is None else (found, True)


def run_cells(
    cells: Sequence[Cell],
    folder: Path,
    *,
    n_jobs: int,
    data_dir: Path | None = None,
    download: bool = False,
    device: str = "auto",
    place: Place | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[list[Finding], bool]:
    """Train what is not complete yet, at most `n_jobs` at a time. Gives how each cell stands, and: was it
    stopped?

    A complete run in folder that was trained by the recipe of a cell stands for it, whatever it is called.
    Every cell of the first seed comes before those of the second, so that a sweep that is broken off has all
    methods with as many seeds. Writes below folder: runs/CELL, jobs/CELL.json, logs/CELL.log. A cell that
    fails does not stop the others, unless they would fail alike, for lack of a data set, a device or a
    library. SIGINT and SIGTERM stop all cells, with their states saved. place: where they run; None for this
    machine.
    """
    place = place or Here(device)
    earlier = complete_runs(folder)
    waiting = [cell for cell in _by_seed(cells) if not run_of(cell, folder, earlier)[1]]
    n_done, n_all = len(cells) - len(waiting), len(cells)
    if n_done:
        say(f"{n_done} of {n_all} runs are complete already")
    began, n_before = time.monotonic(), n_done
    reasons: dict[str, tuple[str, int]] = {}
    running: list[_Job] = []
    with stop_signals(patient=True) as stop:
        try:
            while (waiting and not stop.requested) or running:
                while waiting and len(running) < n_jobs and not stop.requested:
                    slot = min(set(range(n_jobs)) - {job.slot for job in running})
                    running.append(_started(place, waiting.pop(0), folder, slot, data_dir, download, device))
                _wait(running, stop)
                for job in list(running):
                    code = job.started.poll()
                    if code is None:
                        continue
                    running.remove(job)
                    if code == 0:
                        n_done += 1
                        spent_s = time.monotonic() - began
                        left_s = spent_s * (n_all - n_done) / (n_done - n_before)
                        say(f"{n_done}/{n_all} {job.cell.name}{_left_text(left_s)}")
                    elif not stop.requested:
                        reason = _last_words(job.log, code)
                        reasons[job.cell.name] = reason, code
                        say(f"failed: {job.cell.name}: {reason}")
                        if code == _HOPELESS:
                            waiting.clear()
        finally:
            _stop(running)
    findings = []
    for cell in cells:
        run, is_complete = run_of(cell, folder, earlier)
        reason, code = reasons.get(cell.name, ("", 0))
        status = "complete" if is_complete else "failed" if code else "waiting"
        findings.append(Finding(cell=cell, run=run, status=status, reason=reason, exit_code=code))
    return findings, stop.requested


def _left_text(seconds: float) -> str:
    """How long the runs that are left take if they take as long as those before."""
    if not seconds:
        return ""
    minutes = round(seconds / 60)
    return f", about {minutes} min left" if minutes else f", about {max(1, round(seconds))} s left"


def default_jobs(cells: Sequence[Cell], device: str) -> int:
    """As many processes as this machine has cores for, or CUDA devices."""
    n_devices = cuda_devices() if device != "cpu" else 0
    if n_devices:
        return n_devices
    n_threads = max((cell.recipe.threads for cell in cells if isinstance(cell.by, Recipe)), default=1)
    return max(1, n_usable_cores() // max(n_threads, 1))


def _started(
    place: Place, cell: Cell, folder: Path, slot: int, data_dir: Path | None, download: bool, device: str
) -> _Job:
    job = {
        "version": VERSION,
        **cell.document(),
        "out": str(run_folder(folder, cell)),
        "data_dir": str(data_dir) if data_dir else None,
        "download": download,
        "device": device,
    }
    log = folder / "logs" / f"{cell.name}.log"
    job_file = folder / "jobs" / f"{cell.name}.json"
    return _Job(cell=cell, started=place.start(job, job_file, log, slot), log=log, slot=slot)


def _wait(running: Sequence[_Job], stop: Stop) -> None:
    """Return when a process has ended, or when a stop was asked for, which is passed on."""
    while not any(job.started.poll() is not None for job in running):
        if stop.requested:
            _stop(running)
            return
        time.sleep(_LOOK_EVERY_S)


def _stop(running: Sequence[_Job]) -> None:
    """Ask each process to save and end, and wait until it has."""
    for job in running:
        job.started.stop()
    for job in running:
        job.started.wait()


def _last_words(log: Path, code: int) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"It ended with {code} and said nothing."


def _by_seed(cells: Sequence[Cell]) -> list[Cell]:
    seeds = list(dict.fromkeys(cell.seed for cell in cells))
    return sorted(cells, key=lambda cell: seeds.index(cell.seed))
