"""The cells of a grid: one training run each, by its whole recipe."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_export.errors import RecipeError, UsageError
from sparse_export.sweep.grid import DENSE, WITHOUT_DENSITY, Grid, MethodTable, leaves, require_meant
from sparse_export.sweep.program import ProgramCall, Value, flat
from sparse_export.sweep.unused import unused_keys
from sparse_export.train.recipe import Recipe, load_recipe, merged
from sparse_export.train.sparsity_config import SparsityConfig

VERSION = 1
"""Raise it by hand where the same recipe no longer trains the same: where a default of a recipe changes, or
what a method does. All cells then get new names, and no earlier run stands for one."""

PATTERN = "sparsity.pattern"
Setting = tuple[tuple[str, Value], ...]
_MAX_CELLS = 10_000


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run of a grid. name: of its folder; it ends with a hash of what its recipe has other than
    the defaults.

    pattern: None for a dense baseline, and without one.  density: None for a dense baseline, and for as
    much as the pattern allows.  setting: the varied keys that matter to it, with their values.  by: what it
    is trained by; None of a run that is there already.
    """

    name: str
    method: str
    pattern: str | None
    density: float | None
    seed: int
    setting: Setting
    by: Recipe | ProgramCall | None

    @property
    def recipe(self) -> Recipe:
        """What it is trained by, of a cell that calls no program."""
        assert isinstance(self.by, Recipe)
        return self.by

    def document(self) -> dict[str, Any]:
        """What the process of the cell is told of what it is to run."""
        return (
            self.by.table()
            if isinstance(self.by, ProgramCall)
            else {"recipe": self.recipe.model_dump(mode="json")}
        )


def cells_of(grid: Grid, folder: Path = Path()) -> list[Cell]:
    """Every cell once, in the order of the file: methods, then densities, settings and seeds.

    folder: where the grid lies.  A varied key that a method does not read makes no second cell of it.
    Raises RecipeError, naming the cell, for an invalid recipe; UsageError for a grid of no or too
    many cells, one that contradicts itself, see `require_meant`, or one that says what none of its methods
    reads.
    """
    require_meant(grid)
    if grid.program:
        return _program_cells(grid)
    beside = folder / grid.recipe
    source: str | Path = beside if beside.is_file() else grid.recipe
    load_recipe(source)  # that it is there, before anything is said of cells
    densities = {name: _densities(name, grid, grid.method.get(name, MethodTable())) for name in grid.methods}
    n_settings = math.prod(len(values) for values in grid.vary.values())
    n_cells = sum(len(densities[name]) for name in grid.methods) * len(grid.seeds) * n_settings
    if n_cells > _MAX_CELLS:
        raise UsageError(f"The grid has {n_cells} cells.", expected=f"At most {_MAX_CELLS} were expected.")
    settings: list[Setting] = [
        tuple(zip(grid.vary, values, strict=True)) for values in itertools.product(*grid.vary.values())
    ]
    cells: dict[str, Cell] = {}
    unread: dict[str, set[str]] = {}  # by method: the grid's keys that none of its cells reads
    for method in grid.methods:
        own = grid.method.get(method, MethodTable())
        unread[method] = {*grid.vary, *leaves(grid.changes), *leaves(own.changes)}
        for density in densities[method]:
            for setting in settings:
                for seed in grid.seeds:
                    cell, ignored = _cell(source, grid, own, method, density, setting, seed)
                    cells.setdefault(cell.name, cell)
                    unread[method] &= ignored
    _require_read(grid, unread)
    return list(cells.values())


def _program_cells(grid: Grid) -> list[Cell]:
    """The cells of a grid that calls a program: every argument is its own."""
    cells: dict[str, Cell] = {}
    settings: list[Setting] = [
        tuple(zip(grid.vary, values, strict=True)) for values in itertools.product(*grid.vary.values())
    ]
    list(flat(dict.fromkeys(grid.vary, 0), "vary"))
    for method in grid.methods or ("",):
        own = grid.method.get(method, MethodTable())
        common = dict(flat(grid.changes, "changes")) | dict(flat(own.changes, f"method.{method}.changes"))
        for density in _densities(method, grid, own):
            for setting in settings:
                for seed in grid.seeds:
                    said = {"method": method or None, "density": density, "seed": seed}
                    given = {key: value for key, value in said.items() if value is not None}
                    call = ProgramCall(
                        program=grid.program,
                        arguments=tuple(sorted({**common, **dict(setting), **given}.items())),
                    )
                    label = _label(method or grid.program, None, density, setting, seed)
                    name = re.sub(r"[^\w.=+-]", "_", f"{label}-{call.digest(VERSION)}")
                    cells[name] = Cell(
                        name=name,
                        method=method or grid.program,
                        pattern=None,
                        density=density,
                        seed=seed,
                        setting=setting,
                        by=call,
                    )
    if len(cells) > _MAX_CELLS:
        raise UsageError(f"The grid has {len(cells)} cells.", expected=f"At most {_MAX_CELLS} were expected.")
    return list(cells.values())


def _require_read(grid: Grid, unread: Mapping[str, set[str]]) -> None:
    """Raise UsageError for what the grid says to methods that do not read it."""
    by_nobody = set.intersection(*unread.values())
    everybody = ", ".join(grid.methods)
    said = [("vary", key, by_nobody, everybody) for key in grid.vary]
    said += [("changes", key, by_nobody, everybody) for key in leaves(grid.changes)]
    for method, own in grid.method.items():
        said += [(f"method.{method}.changes", key, unread[method], method) for key in leaves(own.changes)]
    for where, key, ignored, methods in said:
        if key in ignored:
            raise UsageError(
                f"The grid has {key} in {where}, which makes no difference to {methods}.",
                expected="A key that the training reads was expected.",
                do="Leave it out, or choose another method.",
            )


def _densities(method: str, grid: Grid, own: MethodTable) -> Sequence[float | None]:
    if method in WITHOUT_DENSITY:
        return (None,)
    return (grid.densities if own.densities is None else own.densities) or (None,)


def _cell(
    source: str | Path,
    grid: Grid,
    own: MethodTable,
    method: str,
    density: float | None,
    setting: Setting,
    seed: int,
) -> tuple[Cell, set[str]]:
    """One cell, and the keys of the grid that it does not read; where they are varied its setting is without
    them.
    """
    recipe = _recipe(source, grid, own, method, density, setting, seed)
    unused = unused_keys(recipe)
    ignored = {
        key
        for key in (*grid.vary, *leaves(grid.changes), *leaves(own.changes))
        if key in unused or (recipe.dense and key.startswith("sparsity."))
    }
    if not ignored.isdisjoint(grid.vary):
        setting = tuple((key, value) for key, value in setting if key not in ignored)
        recipe = _recipe(source, grid, own, method, density, setting, seed)
    pattern = None if recipe.dense or recipe.sparsity.pattern is None else str(recipe.sparsity.pattern)
    if density is None and pattern is None and not recipe.dense:
        raise UsageError(
            f"The grid has no densities for {method}.",
            expected=(
                "densities = [...] was expected, for all methods or below [method.NAME], or a "
                "sparsity.pattern."
            ),
        )
    label = _label(method, pattern, density, setting, seed)
    if recipe.threads == 0:
        # Cells run side by side: one thread each keeps every core at work, and a cell the same on every
        # machine.
        recipe = recipe.model_copy(update={"threads": 1})
    for key, value in setting:
        if (trained := _value_of(recipe, key)) != value:
            raise UsageError(
                f"The cell {label} of the grid would be trained with {key} = {trained!r}.",
                expected="What its name says was expected.",
                do=f"Leave {value!r} out of {key}.",
            )
    name = re.sub(r"[^\w.=+-]", "_", f"{label}-{_digest(recipe)}")
    cell = Cell(
        name=name,
        method=method,
        pattern=pattern,
        density=density,
        seed=seed,
        setting=setting,
        by=recipe,
    )
    return cell, ignored


def _recipe(
    source: str | Path,
    grid: Grid,
    own: MethodTable,
    method: str,
    density: float | None,
    setting: Setting,
    seed: int,
) -> Recipe:
    is_dense = method == DENSE
    changes = merged(grid.changes, own.changes)
    for key, value in setting:
        changes = merged(changes, _nested(key, value))
    changes = merged(changes, {"seed": seed, "dense": is_dense})
    if is_dense:
        changes.pop(
            "sparsity", None
        )  # it may be meant for the others alone, and dense training reads none of it
    else:
        changes = merged(changes, {"sparsity": {"method": method, "density": density}})
    try:
        return load_recipe(source, changes=changes)
    except RecipeError as cause:
        label = _label(method, None, density, setting, seed)
        raise RecipeError(f"The recipe of the grid's run {label} is invalid: {cause}") from cause


def heading(method: str, pattern: str | None, density: float | None) -> str:
    """For people: "asp 2:4", "set 0.1", "set 2:4 0.1"."""
    return " ".join([method, *([pattern] if pattern else []), *([] if density is None else [f"{density:g}"])])


def setting_text(setting: Setting, *, without: str = "") -> str:
    """For people, behind a heading: ", prune_rate 0.3"; the pattern stands in the heading. without: a key."""
    return "".join(
        f", {key.rpartition('.')[2]} {value}" for key, value in setting if key not in (PATTERN, without)
    )


def _label(method: str, pattern: str | None, density: float | None, setting: Setting, seed: int) -> str:
    """As a folder is called: "asp-2of4-seed0", "set-0.1-prune_rate=0.3-seed0"."""
    parts = [heading(method, pattern, density).replace(":", "of").replace(" ", "-")]
    parts += [f"{key.rpartition('.')[2]}={value}" for key, value in setting if key != PATTERN]
    return "-".join([*parts, f"seed{seed}"])


def essence(recipe: Recipe) -> Recipe:
    """The recipe without what changes nothing: dense training knows nothing of sparsity."""
    return recipe.model_copy(update={"sparsity": SparsityConfig()}) if recipe.dense else recipe


def _digest(recipe: Recipe) -> str:
    # Without the defaults, so that a key that recipes get later renames no cell.
    table = essence(recipe).model_dump(mode="json", exclude_defaults=True)
    return hashlib.sha256(f"{VERSION} {json.dumps(table, sort_keys=True)}".encode()).hexdigest()[:10]


def _value_of(recipe: Recipe, key: str) -> object:
    """What the recipe's document has at a dotted key."""
    value: Any = recipe.model_dump(mode="json")
    for part in key.split("."):
        value = value[part]
    return value


def _nested(key: str, value: Value) -> Mapping[str, Any]:
    table: Any = value
    for part in reversed(key.split(".")):
        table = {part: table}
    return dict(table)
