"""A grid of training runs: a TOML file, checked key by key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparse_export.errors import RecipeError, UsageError
from sparse_export.formats.toml import table_from_toml
from sparse_export.sweep.program import Value
from sparse_export.train.methods import METHODS

Density = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]

DENSE = METHODS["dense"].name
WITHOUT_DENSITY = (DENSE, *(name for name, method in METHODS.items() if method.accepts.pattern == "must"))
"""Methods that have none: the dense baseline, and those whose density a pattern decides."""

_LISTS = {
    "sparsity.density": "densities = [...]",
    "sparsity.method": "methods = [...]",
    "seed": "seeds = [...]",
    "dense": 'methods = ["dense", ...]',
}
"""Keys of a recipe that a grid has lists for.

A cell is named by these lists, so nothing else may set them.
"""


_OF_PROGRAM = ("seed", "method", "density", "out")


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class MethodTable(_Table):
    """[method.NAME]: what is different for one method.

    densities: in place of the grid's; under a pattern an empty list stands for as much as it allows.
    changes: of the recipe.
    """

    densities: tuple[Density, ...] | None = None
    changes: dict[str, Any] = {}


class Grid(_Table):
    """The file. recipe: a shipped name, or a TOML file, looked for beside the grid first; or in its place
    program: `module:function` of a user's own, see `sparse_export.sweep.program`, whose arguments are what
    changes and vary then hold.

    methods: of recipes; `dense` is the dense baseline.  densities, seeds: each method is run at
    each of them, those of WITHOUT_DENSITY once a seed.  Under a pattern, densities may be left out: each
    method then has as much as it allows.  changes: of the recipe, in every cell.  vary: dotted keys, like
    "sparsity.prune_rate", with the values to try; several make a product.  method: see `MethodTable`.
    """

    recipe: str = ""
    program: str = ""
    methods: tuple[str, ...] = ()
    densities: tuple[Density, ...] = ()
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    changes: dict[str, Any] = {}
    vary: dict[str, Annotated[tuple[Value, ...], Field(min_length=1)]] = {}
    method: dict[str, MethodTable] = {}


def load_grid(path: Path) -> Grid:
    """Read a grid. Raises RecipeError for a file that is none, and what the file system raises."""
    if not path.is_file():
        raise UsageError(f"There is no file {path}.", expected="A grid in TOML was expected.")
    try:
        table = table_from_toml(path.read_bytes())
    except ValueError as cause:
        raise RecipeError(
            f"{path} is not TOML: {cause}.", expected="A grid in TOML was expected.", do="Mend the file."
        ) from cause
    try:
        return Grid.model_validate_json(json.dumps(table, default=str))
    except ValidationError as cause:
        raise RecipeError(f"The grid {path} is not right.", expected=_first_fault(cause)) from cause


def require_meant(grid: Grid) -> None:
    """Raise UsageError for what contradicts a list of the grid, or belongs to a method that it does not
    run.
    """
    if bool(grid.recipe) == bool(grid.program):
        raise RecipeError(
            "The grid has both a recipe and a program."
            if grid.recipe
            else "The grid has neither a recipe nor a program.",
            expected='recipe = "NAME" or program = "module:function" was expected.',
        )
    if grid.recipe and not grid.methods:
        raise RecipeError("The grid lacks the key 'methods'.")
    strangers = [name for name in grid.method if name not in grid.methods]
    if strangers:
        raise UsageError(
            f"The grid has [method.{strangers[0]}].",
            expected=f"Tables for its methods were expected: {', '.join(grid.methods)}.",
        )
    for method in WITHOUT_DENSITY:
        if method in grid.method and grid.method[method].densities is not None:
            why = "a dense baseline has none" if method == DENSE else f"the pattern decides that of {method}"
            raise UsageError(
                f"The grid has densities in [method.{method}].",
                expected=f"None were expected: {why}.",
                do="Leave them out.",
            )
    changes = {"changes": grid.changes} | {
        f"method.{m}.changes": own.changes for m, own in grid.method.items()
    }
    keys = [("vary", key) for key in grid.vary]
    keys += [(where, key) for where, table in changes.items() for key in leaves(table)]
    for where, key in keys:
        if grid.program and key in _OF_PROGRAM:
            raise UsageError(
                f"The grid has {key} in {where}.",
                expected=f"A program gets its {key} from the sweep: by seeds, methods, densities, --out.",
                do="Move it there, or call the argument otherwise.",
            )
        if key in _LISTS:
            raise UsageError(
                f"The grid has {key} in {where}.",
                expected=f"{_LISTS[key]} was expected, which is where a grid says this.",
                do=f"Move it to {_LISTS[key].partition(' ')[0]}.",
            )
        if key == "sparsity":
            raise UsageError(
                f"The grid has sparsity, without a key below it, in {where}.",
                expected="Something like sparsity.prune_rate was expected.",
            )


def leaves(table: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """The dotted keys of a nested mapping that hold values; an empty table holds none."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}"


def _first_fault(error: ValidationError) -> str:
    faults = error.errors()  # an unknown key first: a missing one is often that one, misspelt
    fault = next((one for one in faults if one["type"] == "extra_forbidden"), faults[0])
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"It has an unknown key {where!r}; known are {', '.join(Grid.model_fields)}."
    if fault["type"] == "missing":
        return f"It lacks the key {where!r}."
    return f"{where} is {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}."
