"""Runs that are there already, as the cells of a sweep: told apart by what their recipes differ in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_export.errors import UsageError
from sparse_export.formats.run import RunInfo, read_run_info
from sparse_export.sweep.earlier import recorded_recipe
from sparse_export.sweep.grid import DENSE, WITHOUT_DENSITY
from sparse_export.sweep.program import Value
from sparse_export.sweep.run_list import PATTERN, Cell, Setting
from sparse_export.sweep.running import Finding
from sparse_export.sweep.unused import unused_keys

__all__ = ["findings_of", "varied_keys"]

_NAMED = ("seed", "dense", "sparsity.method", "sparsity.density")
"""Keys of a recipe that a cell is named by anyway."""


def findings_of(runs: Sequence[Path]) -> list[Finding]:
    """What sweeps find of their cells, of runs that are there.

    Args:
        runs: their folders.

    Returns:
        In the order of methods as they first come, densities and seeds.

    Raises:
        UsageError: none is given, two of them are the same seed of the same settings, or their scores are not
            of one kind.
        ArtefactError: a folder holds no run.
    """
    if not runs:
        raise UsageError("No run was given.", expected="Folders of runs were expected.")
    infos = [read_run_info(run) for run in runs]
    keys = _differing([_leaves(info) for info in infos])
    findings = [_finding(run, info, keys) for run, info in zip(runs, infos, strict=True)]
    seen: dict[tuple[object, ...], Path] = {}
    for one in findings:
        cell = one.cell
        key = (cell.method, cell.pattern, cell.density, cell.setting, cell.seed)
        if key in seen:
            raise UsageError(
                f"{seen[key]} and {one.run} are seed {cell.seed} of the same method, density and settings.",
                expected="Runs that differ were expected: an interval over copies would be too narrow.",
                do="Leave out one of them, or give your own loops different seeds.",
            )
        seen[key] = one.run
    methods = list(dict.fromkeys(one.cell.method for one in findings))
    return sorted(
        findings,
        key=lambda one: (
            methods.index(one.cell.method),
            one.cell.density or 0.0,
            tuple(str(value) for value in one.cell.setting),
            one.cell.seed,
        ),
    )


def varied_keys(findings: Sequence[Finding]) -> list[str]:
    """The keys of the settings of all cells, each once."""
    return list(dict.fromkeys(key for one in findings for key, _ in one.cell.setting))


def _finding(run: Path, info: RunInfo, keys: Sequence[str]) -> Finding:
    leaves = _leaves(info)
    recipe = recorded_recipe(info)
    unread = frozenset[str]() if recipe is None else unused_keys(recipe)
    setting: Setting = tuple(
        (key, leaves[key]) for key in keys if key in leaves and key not in unread and leaves[key] != _NOT_SET
    )
    pattern = leaves.get(PATTERN)
    has_density = (
        info.method not in WITHOUT_DENSITY and info.recipe.get("sparsity", {}).get("pattern") is None
    )
    cell = Cell(
        name=run.name,
        method=info.method,
        pattern=None if info.method == DENSE or pattern in (None, _NOT_SET) else str(pattern),
        density=info.target_density if has_density else None,
        seed=info.seed,
        setting=setting,
        by=None,
    )
    return Finding(cell=cell, run=run, status="complete" if info.status == "complete" else "waiting")


_NOT_SET = "not set"


def _leaves(info: RunInfo) -> dict[str, Value]:
    """The settings of a run's recipe by dotted keys; of a dense run without those of sparsity."""
    found: dict[str, Value] = {}

    def walk(table: Mapping[str, Any], above: str) -> None:
        for key, value in table.items():
            name = f"{above}{key}"
            if isinstance(value, Mapping):
                walk(value, f"{name}.")
            elif name not in _NAMED and not (info.method == DENSE and name.startswith("sparsity.")):
                found[name] = _value(value)

    walk(info.recipe, "")
    return found


def _value(value: object) -> Value:
    if value is None:
        return _NOT_SET
    return value if isinstance(value, Value) else json.dumps(value)


def _differing(tables: Sequence[Mapping[str, Value]]) -> list[str]:
    """Keys that have more than one value in the tables that have them."""
    values: dict[str, set[Value]] = {}
    for table in tables:
        for key, value in table.items():
            values.setdefault(key, set()).add(value)
    return [key for key, found in values.items() if len(found) > 1]
