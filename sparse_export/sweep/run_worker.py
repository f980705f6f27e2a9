"""Runs one cell of a sweep, in a process of its own: python -m sparse_export.sweep.run_worker JOB.json"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_export.errors import SparseExportError, UsageError
from sparse_export.files import claimed
from sparse_export.formats.run import RUN_FILE, read_run_info
from sparse_export.sweep.earlier import recorded_recipe
from sparse_export.sweep.program import ProgramCall, call_program
from sparse_export.sweep.run_list import essence
from sparse_export.train.loop import train
from sparse_export.train.observer import SilentObserver
from sparse_export.train.recipe import Recipe, recipe_from_table

if TYPE_CHECKING:
    from torch import Tensor

    from sparse_export.train.metrics import EpochMetrics

_ORPHAN_S = 60.0  # for a cell of a sweep that was killed: it saves its state and ends after a step


class _Orphan(SilentObserver):
    """Says a line an epoch, and asks for a stop, with the state saved, when the sweep that started it is
    gone.
    """

    def __init__(self, parent: int) -> None:
        self._parent = parent

    def stepped(self, step: int, loss: Tensor) -> None:
        if os.getppid() != self._parent:
            self._parent = os.getppid()
            os.kill(os.getpid(), signal.SIGTERM)

    def finished_epoch(self, metrics: EpochMetrics) -> None:
        print(
            f"epoch {metrics.epoch}  loss {metrics.train_loss:.4f}  validation {metrics.validation_score}",
            flush=True,
        )


def main(job_file: Path) -> int:
    """Train, or go on. Gives the exit code; what went wrong is the last line of stderr."""
    job = json.loads(job_file.read_bytes())
    out = Path(job["out"])
    try:
        if "program" in job:
            with claimed(out, wait_s=_ORPHAN_S):
                call_program(ProgramCall.from_table(job), out)
            return 0
        recipe = recipe_from_table(job["recipe"], source=str(job_file))
        with claimed(out, wait_s=_ORPHAN_S):
            resume = (out / RUN_FILE).is_file()
            if resume:
                _require_same(recipe, out)
            train(
                None if resume else recipe,
                out,
                data_dir=Path(job["data_dir"]) if job["data_dir"] else None,
                download=job["download"],
                device=job["device"],
                resume=resume,
                observer=_Orphan(job["parent"]),
            )
    except SparseExportError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _require_same(recipe: Recipe, run: Path) -> None:
    """Raise UsageError for a run that was begun by another recipe; ArtefactError for one that is damaged."""
    recorded = recorded_recipe(read_run_info(run))
    if recorded is not None and recorded != essence(recipe):
        raise UsageError(
            f"{run} holds a run that was begun by another recipe.",
            expected="This cell's run was expected there.",
            do="Move it away, or sweep into another folder.",
        )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
