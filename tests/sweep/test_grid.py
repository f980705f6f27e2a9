"""Grids: the cells that a file stands for, and invalid files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import sparse_export.sweep.run_list
from sparse_export.errors import RecipeError, UnknownNameError, UsageError
from sparse_export.sweep.grid import load_grid
from sparse_export.sweep.run_list import Cell, cells_of
from sparse_export.train.recipe import Recipe, load_recipe
from sparse_export.train.sparsity_config import (
    DEFAULT_APPROACH,
    DEFAULT_DENSITY,
    DEFAULT_FREEZE,
    SparsityConfig,
)

DEFAULTS: dict[str, Any] = {
    "batch_size": 100,
    "seed": 0,
    "validation_fraction": 0.1,
    "threads": 0,
    "dense": False,
    "augment": "none",
    "workers": 0,
    "image_size": None,
    "precision": "fp32",
    "channels_last": False,
    "compile": False,
    "cuda_graph": False,
    "sync_batch_norm": False,
    "ema": 0.0,
    "loss": "",
    "grad_clip": 0.0,
    "accumulate": 1,
    "label_smoothing": 0.0,
    "optimizer.name": "sgd",
    "optimizer.lr": 0.1,
    "optimizer.momentum": 0.9,
    "optimizer.nesterov": True,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.weight_decay": 0.0005,
    "optimizer.decay_vectors": True,
    "learning_rate.schedule": "step",
    "learning_rate.drops": [0.463, 0.926],
    "learning_rate.factor": 0.1,
    "learning_rate.warmup": 0.0,
    "sparsity.method": "sparse-momentum",
    "sparsity.density": None,
    "sparsity.pattern": None,
    "sparsity.approach": None,
    "sparsity.freeze": None,
    "sparsity.small_share": 0.01,
    "sparsity.transposable": False,
    "sparsity.decay": 0.0002,
    "sparsity.start": "erdos-renyi",
    "sparsity.rescale": True,
    "sparsity.prune_rate": 0.5,
    "sparsity.final_prune_rate": None,
    "sparsity.prune_schedule": "cosine",
    "sparsity.prune": None,
    "sparsity.redistribution": None,
    "sparsity.growth": None,
    "sparsity.update_every": 0,
    "sparsity.keep_dense": [],
    "sparsity.products": "dense",
    "sparsity.window": None,
}
"""Of every key of a recipe, under `cells.VERSION` 1; a later key need not be listed."""

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "grids"


def cells(tmp_path: Path, text: str) -> list[Cell]:
    file = tmp_path / "grid.toml"
    file.write_text(text)
    return cells_of(load_grid(file), tmp_path)


def test_a_grid_is_the_product_of_what_it_lists(tmp_path: Path) -> None:
    found = cells(
        tmp_path,
        'recipe = "digits"\nmethods = ["set", "dense"]\ndensities = [0.1, 0.2]\nseeds = [3, 4]\n'
        '[vary]\n"sparsity.prune_rate" = [0.3, 0.5, 0.7]\n',
    )
    sparse = [cell for cell in found if cell.method == "set"]
    assert {(c.density, c.seed, dict(c.setting)["sparsity.prune_rate"]) for c in sparse} == {
        (density, seed, rate) for density in (0.1, 0.2) for seed in (3, 4) for rate in (0.3, 0.5, 0.7)
    }
    assert len(sparse) == 12
    for cell in sparse:
        settings = cell.recipe.sparsity
        assert (settings.method, settings.density, cell.recipe.seed, settings.prune_rate) == (
            "set",
            cell.density,
            cell.seed,
            dict(cell.setting)["sparsity.prune_rate"],
        )
        assert cell.recipe.threads == 1
    assert len({cell.name for cell in found}) == len(found)


def test_a_cell_is_trained_by_what_its_label_says(tmp_path: Path) -> None:
    """Every key of the label, looked up in the recipe that the cell is trained by."""
    found = cells(
        tmp_path,
        'recipe = "digits"\nmethods = ["dense", "set", "rigl"]\ndensities = [0.1, 0.3]\nseeds = [3, 4]\n'
        '[vary]\n"sparsity.prune_rate" = [0.3, 0.5]\n"sparsity.prune_schedule" = ["cosine", "linear"]\n'
        '"optimizer.momentum" = [0.5, 0.9]\n"learning_rate.schedule" = ["step", "cosine"]\n'
        'epochs = [2, 3]\nema = [0.0, 0.9]\n"optimizer.nesterov" = [true, false]\n'
        "[method.rigl]\ndensities = [0.2]\nchanges = { sparsity = { prune_rate = 0.1 } }\n",
    )
    n_settings = {"dense": 2**5, "set": 2**7, "rigl": 2**7}
    n_densities = {"dense": 1, "set": 2, "rigl": 1}
    for method, n in n_settings.items():
        assert sum(cell.method == method for cell in found) == n * n_densities[method] * 2
    for cell in found:
        recipe = cell.recipe
        assert recipe.seed == cell.seed
        assert recipe.dense == (cell.method == "dense")
        if not recipe.dense:
            assert (recipe.sparsity.method, recipe.sparsity.density) == (cell.method, cell.density)
        for key, value in cell.setting:
            table: Any = recipe.model_dump()
            for part in key.split("."):
                table = table[part]
            assert table == value, key


@pytest.mark.parametrize("key", ["sparsity.density", "sparsity.method", "seed", "dense"])
@pytest.mark.parametrize("where", ["vary", "changes", "method.set.changes"])
def test_what_a_grid_has_lists_for_is_set_by_them_alone(tmp_path: Path, key: str, where: str) -> None:
    way = {"sparsity.density": "densities", "sparsity.method": "methods", "seed": "seeds", "dense": "methods"}
    line = f'[vary]\n"{key}" = [0.1, 0.2]\n' if where == "vary" else f"[{where}]\n{key} = 1\n"
    with pytest.raises(UsageError, match=rf"has {key} in {where}\. {way[key]} = \[") as caught:
        cells(tmp_path, f'recipe = "digits"\nmethods = ["set"]\ndensities = [0.1]\n{line}')
    assert f"Move it to {way[key]}." in str(caught.value)


@pytest.mark.parametrize("method", ["dense", "static", "snip", "magnitude"])
def test_a_method_is_run_once_a_seed_whatever_varies_that_it_does_not_read(
    tmp_path: Path, method: str
) -> None:
    head = f'recipe = "digits"\nmethods = ["{method}", "set"]\ndensities = [0.1]\nseeds = [3, 4]\n[vary]\n'
    rates = cells(tmp_path, head + '"sparsity.prune_rate" = [0.3, 0.5]\n')
    assert [(cell.seed, cell.setting) for cell in rates if cell.method == method] == [(3, ()), (4, ())]
    assert sum(cell.method == "set" for cell in rates) == 4
    momenta = cells(tmp_path, head + '"optimizer.momentum" = [0.5, 0.9]\n')
    assert sum(cell.method == method for cell in momenta) == 4


def test_a_key_that_is_read_under_some_settings_only_is_varied_under_these(tmp_path: Path) -> None:
    found = cells(
        tmp_path,
        'recipe = "digits"\nmethods = ["set"]\ndensities = [0.1]\n[vary]\n'
        '"learning_rate.schedule" = ["cosine", "step"]\n"learning_rate.factor" = [0.2, 0.3]\n',
    )
    assert [tuple(dict(cell.setting).values()) for cell in found] == [
        ("cosine",),
        ("step", 0.2),
        ("step", 0.3),
    ]
    assert found[0].recipe.learning_rate.factor == load_recipe("digits").learning_rate.factor


def test_a_method_may_have_its_own_densities_and_changes(tmp_path: Path) -> None:
    found = cells(
        tmp_path,
        'recipe = "digits"\nmethods = ["set", "rigl"]\ndensities = [0.1]\nchanges = { epochs = 2 }\n'
        "[method.rigl]\ndensities = [0.2, 0.3]\nchanges = { sparsity = { update_every = 7 } }\n",
    )
    assert [(c.method, c.density, c.recipe.epochs, c.recipe.sparsity.update_every) for c in found] == [
        ("set", 0.1, 2, 0),
        ("rigl", 0.2, 2, 7),
        ("rigl", 0.3, 2, 7),
    ]


def test_a_cells_name_changes_with_what_changes_its_result_and_with_nothing_else(tmp_path: Path) -> None:
    text = 'recipe = "digits"\nmethods = ["set"]\ndensities = [0.1]\n'
    (cell,) = cells(tmp_path, text)
    (same, _) = cells(tmp_path, text.replace("[0.1]", "[0.1, 0.2]"))
    (other,) = cells(tmp_path, text + "changes = { epochs = 2 }\n")
    assert cell.name == same.name != other.name


def test_under_a_pattern_densities_may_be_left_out(tmp_path: Path) -> None:
    methods = ("dense", "sparse-momentum", "rigl", "sr-ste", "asp")
    found = cells(
        tmp_path,
        f'recipe = "digits"\nmethods = {list(methods)}\nchanges = {{ sparsity = {{ pattern = "2:4" }} }}\n',
    )
    assert [cell.method for cell in found] == list(methods)
    for cell in found:
        assert cell.density is None
        if cell.method == "dense":
            assert (cell.pattern, cell.recipe.dense) == (None, True)
            assert cell.name.startswith("dense-seed0-")
        else:
            settings = cell.recipe.sparsity
            assert (settings.method, str(settings.pattern), settings.density) == (cell.method, "2:4", None)
            assert cell.pattern == "2:4"
            assert cell.name.startswith(f"{cell.method}-2of4-seed0-")


def test_what_a_pattern_decides_alone_is_run_once_beside_densities_and_patterns_may_vary(
    tmp_path: Path,
) -> None:
    found = cells(
        tmp_path,
        'recipe = "digits"\nmethods = ["sparse-momentum", "set", "asp"]\ndensities = [0.1, 0.2]\n'
        '[vary]\n"sparsity.pattern" = ["2:4", "1:4"]\n[method.set]\ndensities = []\n',
    )
    assert [(cell.method, cell.pattern, cell.density) for cell in found] == [
        ("sparse-momentum", "2:4", 0.1),
        ("sparse-momentum", "1:4", 0.1),
        ("sparse-momentum", "2:4", 0.2),
        ("sparse-momentum", "1:4", 0.2),
        ("set", "2:4", None),
        ("set", "1:4", None),
        ("asp", "2:4", None),
        ("asp", "1:4", None),
    ]
    for cell in found:
        assert str(cell.recipe.sparsity.pattern) == dict(cell.setting)["sparsity.pattern"] == cell.pattern
        assert cell.recipe.sparsity.density == cell.density
    assert found[0].name.startswith("sparse-momentum-2of4-0.1-seed0-")


def test_a_pattern_may_be_one_methods_alone(tmp_path: Path) -> None:
    set_, asp = cells(
        tmp_path,
        'recipe = "digits"\nmethods = ["set", "asp"]\ndensities = [0.1]\n'
        '[method.asp.changes]\nsparsity = { pattern = "2:4" }\n',
    )
    assert (set_.pattern, set_.density, asp.pattern, asp.density) == (None, 0.1, "2:4", None)


@pytest.mark.parametrize("method", ["set", "dense"])
def test_a_key_that_recipes_get_later_renames_no_cell(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recipes with one more key, at the top and below sparsity, with a default each."""
    text = f'recipe = "digits"\nmethods = ["{method}"]\ndensities = [0.1]\n'
    (cell,) = cells(tmp_path, text)

    @dataclass(frozen=True, kw_only=True)
    class LaterSparsity(SparsityConfig):
        later: float = 0.5

    class LaterRecipe(Recipe):
        later: tuple[int, ...] = (1, 2)
        sparsity: SparsityConfig = LaterSparsity()

    def later_recipe(*args: Any, **settings: Any) -> Recipe:
        table = load_recipe(*args, **settings).model_dump()
        return LaterRecipe(**{**table, "sparsity": LaterSparsity(**table["sparsity"])})

    monkeypatch.setattr(sparse_export.sweep.run_list, "load_recipe", later_recipe)
    monkeypatch.setattr(sparse_export.sweep.run_list, "SparsityConfig", LaterSparsity)
    (later,) = cells(tmp_path, text)
    assert "later" in later.recipe.model_dump()
    assert later.name == cell.name


def test_a_raised_version_renames_every_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'recipe = "digits"\nmethods = ["set"]\ndensities = [0.1]\n'
    (cell,) = cells(tmp_path, text)
    monkeypatch.setattr(sparse_export.sweep.run_list, "VERSION", 2)
    (raised,) = cells(tmp_path, text)
    assert raised.name != cell.name
    assert raised.recipe == cell.recipe


def test_defaults_of_recipes_are_those_that_the_version_stands_for() -> None:
    """A changed default trains a cell of the same name otherwise: raise `cells.VERSION`, and write it down
    here.
    """
    recipe = Recipe(model="digits-cnn", data="digits", epochs=1).model_dump(mode="json")
    now = {
        f"{key}.{below}" if below else key: value
        for key, held in recipe.items()
        for below, value in (held.items() if isinstance(held, dict) else [("", held)])
    }
    assert sparse_export.sweep.run_list.VERSION == 1
    assert {key: now.get(key, "gone") for key in DEFAULTS} == DEFAULTS
    assert (DEFAULT_DENSITY, DEFAULT_APPROACH, DEFAULT_FREEZE) == (0.05, (0.0, 0.0), 0.75)


def test_sparsity_does_not_change_the_name_of_a_dense_twin(tmp_path: Path) -> None:
    text = 'recipe = "digits"\nmethods = ["dense", "set"]\ndensities = [0.1]\n'
    dense, sparse = cells(tmp_path, text)
    same, other = cells(tmp_path, text + "changes = { sparsity = { prune_rate = 0.1 } }\n")
    assert same.name == dense.name
    assert other.name != sparse.name


def test_a_recipe_beside_the_grid_is_found(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('model = "digits-cnn"\ndata = "digits"\nepochs = 9\n')
    (cell,) = cells(tmp_path, 'recipe = "mine.toml"\nmethods = ["set"]\ndensities = [0.1]\n')
    assert cell.recipe.epochs == 9


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("methods = [", RecipeError, "is not TOML"),
        ('methods = ["set"]', RecipeError, "neither a recipe nor a program"),
        ('recipe = "digits"\nmethod = ["set"]', RecipeError, "method"),
        ('recipe = "digits"\nmethods = ["set"]\ndensity = [0.1]', RecipeError, "unknown key 'density'"),
        ('recipe = "digits"\nmethods = []', RecipeError, "lacks the key 'methods'"),
        ('recipe = "digits"\nmethods = ["set"]\ndensities = [1.5]', RecipeError, "densities.0 is 1.5"),
        ('recipe = "digits"\nmethods = ["set"]', UsageError, "no densities for set"),
        ('recipe = "digit"\nmethods = ["set"]\ndensities = [0.1]', UnknownNameError, "Did you mean 'digits'"),
        ('recipe = "digits"\nmethods = ["sett"]\ndensities = [0.1]', RecipeError, "run sett-0.1-seed0"),
        (
            'recipe = "digits"\nmethods = ["set"]\ndensities = [0.1]\n[vary]\n"sparsity.prune" = ["half"]',
            RecipeError,
            "run set-0.1-prune=half-seed0",
        ),
        (
            'recipe = "digits"\nmethods = ["set"]\ndensities = [0.1]\n[method.rigl]\ndensities = [0.2]',
            UsageError,
            r"\[method.rigl\]",
        ),
        (
            'recipe = "digits"\nmethods = ["dense"]\n[method.dense]\ndensities = [0.2]',
            UsageError,
            "a dense baseline has none",
        ),
        (
            'recipe = "digits"\nmethods = ["asp"]\n[method.asp]\ndensities = [0.2]',
            UsageError,
            "the pattern decides that of asp",
        ),
        (
            'recipe = "digits"\nmethods = ["static", "dense"]\ndensities = [0.1]\nvary = { "sparsity.prune_rate" = [0.1] }',
            UsageError,
            "has sparsity.prune_rate in vary, which makes no difference to static, dense",
        ),
        (
            'recipe = "digits"\nmethods = ["asp"]\nchanges = { sparsity = { pattern = "2:4", update_every = 7 } }',
            UsageError,
            "has sparsity.update_every in changes, which makes no difference to asp",
        ),
        (
            'recipe = "digits"\nmethods = ["static", "set"]\ndensities = [0.1]\n[method.static.changes]\nsparsity = { prune_rate = 0.1 }',
            UsageError,
            r"has sparsity.prune_rate in method.static.changes, which makes no difference to static",
        ),
        (
            'recipe = "digits"\nmethods = ["dense"]\n[vary]\n"sparsity.nothing" = [1]',
            UsageError,
            "sparsity.nothing in vary, which makes no difference to dense",
        ),
        ('recipe = "digits"\nmethods = ["asp"]\ndensities = [0.2]', RecipeError, "'asp' needs a pattern"),
        (
            'recipe = "digits"\nmethods = ["set"]\ndensities = [0.6]\n[vary]\n"sparsity.pattern" = ["2:4"]',
            RecipeError,
            "allows a density of 0.5 at most",
        ),
        (
            'recipe = "digits"\nmethods = ["snip"]\n[vary]\n"sparsity.pattern" = ["2:4"]',
            RecipeError,
            "takes no pattern",
        ),
        (
            'recipe = "digits"\nmethods = ["set"]\ndensities = [0.1]\n[vary]\n'
            + "".join(
                f'"{key}" = {list(range(100))}\n' for key in ("epochs", "batch_size", "workers", "threads")
            ),
            UsageError,
            "has 100000000 cells",
        ),
        (
            'recipe = "digits"\nmethods = ["set"]\ndensities = [0.1]\n[vary]\nthreads = [0, 2]',
            UsageError,
            "would be trained with threads = 1",
        ),
        (
            'recipe = "digits"\nmethods = ["set"]\ndensities = [0.1]\n[vary]\nsparsity = [0.5]',
            UsageError,
            "sparsity, without a key below it, in vary",
        ),
        (
            'recipe = "digits"\nmethods = ["set"]\ndensities = [0.1]\nchanges = { sparsity = 0.5 }',
            UsageError,
            "sparsity, without a key below it, in changes",
        ),
        (
            'recipe = "digits"\nmethods = ["static"]\ndensities = [0.1]\n[vary]\n"sparsity.growth" = ["random"]',
            RecipeError,
            "the method is 'static'",
        ),
    ],
)
def test_a_grid_that_cannot_be_meant_is_refused(
    tmp_path: Path, text: str, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        cells(tmp_path, text)


def test_a_missing_grid_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no file"):
        load_grid(tmp_path / "none.toml")


@pytest.mark.parametrize("file", sorted(BENCHMARKS.glob("*.toml")), ids=lambda file: file.stem)
def test_the_grids_that_come_along_are_right(file: Path) -> None:
    assert cells_of(load_grid(file), file.parent)
