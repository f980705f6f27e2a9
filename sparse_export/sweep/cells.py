"""The cells of a grid: one training run each, by its whole recipe."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_export.errors import RecipeError, UsageError
from sparse_export.sweep.grid import DENSE, Grid, MethodTable, Value, require_meant
from sparse_export.train.recipe import Recipe, SparsityRecipe, load_recipe, merged

VERSION = 1
"""Raise it by hand where the same recipe no longer trains the same: where a default of a recipe changes, or what a
method does. All cells then get new names, and no earlier run stands for one."""

_MAX_CELLS = 10_000


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run of a grid. name: of its folder; it ends with a hash of what its recipe has other than the defaults.

    density: None for a dense twin.  setting: the varied keys that matter to it, with their values.
    """

    name: str
    method: str
    density: float | None
    seed: int
    setting: tuple[tuple[str, Value], ...]
    recipe: Recipe


def cells_of(grid: Grid, folder: Path = Path()) -> list[Cell]:
    """Every cell once, in the order of the file: methods, then densities, settings and seeds.

    folder: where the grid lies.  A setting that a dense twin has not, one of sparsity, makes no second dense twin.
    Raises RecipeError, naming the cell, for a recipe that cannot be meant; UsageError for a grid of no or too many
    cells, or one that contradicts itself, see `require_meant`.
    """
    require_meant(grid)
    beside = folder / grid.recipe
    source: str | Path = beside if beside.is_file() else grid.recipe
    load_recipe(source)  # that it is there, before anything is said of cells
    settings = [
        tuple(zip(grid.vary, values, strict=True)) for values in itertools.product(*grid.vary.values())
    ]
    n_cells = len(grid.methods) * max(len(grid.densities), 1) * len(grid.seeds) * len(settings)
    if n_cells > _MAX_CELLS:
        raise UsageError(f"The grid has {n_cells} cells.", expected=f"At most {_MAX_CELLS} were expected.")
    cells: dict[str, Cell] = {}
    for method in grid.methods:
        own = grid.method.get(method, MethodTable())
        for density in _densities(method, grid, own):
            for setting in settings:
                for seed in grid.seeds:
                    cell = _cell(source, grid, own, method, density, setting, seed)
                    cells.setdefault(cell.name, cell)
    return list(cells.values())


def _densities(method: str, grid: Grid, own: MethodTable) -> Sequence[float | None]:
    if method == DENSE:
        return (None,)
    densities = grid.densities if own.densities is None else own.densities
    if not densities:
        raise UsageError(
            f"The grid has no densities for {method}.",
            expected="densities = [...] was expected, for all methods or below [method.NAME].",
        )
    return densities


def _cell(
    source: str | Path,
    grid: Grid,
    own: MethodTable,
    method: str,
    density: float | None,
    setting: tuple[tuple[str, Value], ...],
    seed: int,
) -> Cell:
    sparsity: dict[str, Any] = {"method": method, "density": density}
    if density is None:
        setting = tuple((key, value) for key, value in setting if not key.startswith("sparsity."))
        sparsity = {}
    changes = merged(grid.changes, own.changes)
    for key, value in setting:
        changes = merged(changes, _nested(key, value))
    changes = merged(changes, {"seed": seed, "dense": density is None, "sparsity": sparsity})
    label = "-".join(
        [
            method if density is None else f"{method}-{density:g}",
            *(f"{key.rpartition('.')[2]}={value}" for key, value in setting),
            f"seed{seed}",
        ]
    )
    try:
        recipe = load_recipe(source, changes=changes)
    except RecipeError as cause:
        raise RecipeError(f"The cell {label} of the grid cannot be meant: {cause}") from cause
    if recipe.threads == 0:
        # Cells run side by side: one thread each keeps every core at work, and a cell the same on every machine.
        recipe = recipe.model_copy(update={"threads": 1})
    for key, value in setting:
        if (trained := _value_of(recipe, key)) != value:
            raise UsageError(
                f"The cell {label} of the grid would be trained with {key} = {trained!r}.",
                expected="What its name says was expected.",
                do=f"Leave {value!r} out of {key}.",
            )
    name = re.sub(r"[^\w.=+-]", "_", f"{label}-{_digest(recipe)}")
    return Cell(name=name, method=method, density=density, seed=seed, setting=setting, recipe=recipe)


def essence(recipe: Recipe) -> Recipe:
    """The recipe without what changes nothing: dense training knows nothing of sparsity."""
    return recipe.model_copy(update={"sparsity": SparsityRecipe()}) if recipe.dense else recipe


def _digest(recipe: Recipe) -> str:
    # Without the defaults, so that a key that recipes get later renames no cell.
    table = essence(recipe).model_dump(mode="json", exclude_defaults=True)
    return hashlib.sha256(f"{VERSION} {json.dumps(table, sort_keys=True)}".encode()).hexdigest()[:10]


def _value_of(recipe: Recipe, key: str) -> object:
    value: object = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _nested(key: str, value: Value) -> Mapping[str, Any]:
    table: Any = value
    for part in reversed(key.split(".")):
        table = {part: table}
    return dict(table)
