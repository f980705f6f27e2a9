"""Which runs of a sweep's folder are there already, by the recipes that they recorded."""

from __future__ import annotations

import json
from pathlib import Path

from sparse_export.errors import RecipeError, SparseExportError
from sparse_export.formats.run import RUN_FILE, RunInfo, read_run_info
from sparse_export.sweep import run_list
from sparse_export.sweep.program import ProgramCall
from sparse_export.train.recipe import Recipe, recipe_from_table

_FIRST_VERSION = 1  # of sweeps that recorded none


def complete_runs(folder: Path) -> dict[Recipe, Path]:
    """The complete runs below a sweep's folder, by what matters of their recipes, whatever the folders are
    called.

    Left out: runs of another `cells.VERSION`, and what cannot be read.
    """
    runs: dict[Recipe, Path] = {}
    for file in sorted(folder.glob(f"runs/*/{RUN_FILE}")):
        run = file.parent
        recipe = complete_recipe(run)
        if recipe is not None and _version_of(folder / "jobs" / f"{run.name}.json") == run_list.VERSION:
            runs.setdefault(recipe, run)
    return runs


def complete_recipe(run: Path) -> Recipe | None:
    """What matters of the recipe of a run that has ended well; None for any other, and for one that cannot be
    read.
    """
    try:
        info = read_run_info(run) if (run / RUN_FILE).is_file() else None
    except SparseExportError:
        return None
    return recorded_recipe(info) if info is not None and info.status == "complete" else None


def is_complete_call(run: Path, cell: run_list.Cell) -> bool:
    """Is a folder the finished run of a cell that calls a program, as the job beside it says?"""
    try:
        job = json.loads((run.parent.parent / "jobs" / f"{run.name}.json").read_text())
        is_same = ProgramCall.from_table(job) == cell.by and job.get("version") == run_list.VERSION
        return is_same and (run / RUN_FILE).is_file() and read_run_info(run).status == "complete"
    except (OSError, ValueError, KeyError, AttributeError, TypeError, SparseExportError):
        return False


def recorded_recipe(info: RunInfo) -> Recipe | None:
    """What matters of a recorded recipe; None for one that is no recipe any more."""
    try:
        return run_list.essence(recipe_from_table(info.recipe, source=RUN_FILE))
    except RecipeError:
        return None


def _version_of(job_file: Path) -> int:
    """By which `cells.VERSION` a run was trained."""
    try:
        version = json.loads(job_file.read_text()).get("version", _FIRST_VERSION)
    except (OSError, ValueError, AttributeError):
        return _FIRST_VERSION
    return version if isinstance(version, int) else _FIRST_VERSION
