"""Grids: the cells that a file stands for, and files that cannot be meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_export.errors import RecipeError, UnknownNameError, UsageError
from sparse_export.sweep.cells import Cell, cells_of
from sparse_export.sweep.grid import load_grid

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
            table = recipe.model_dump()
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


def test_dense_twins_are_run_once_a_seed_whatever_of_sparsity_varies(tmp_path: Path) -> None:
    head = 'recipe = "digits"\nmethods = ["dense"]\nseeds = [3, 4]\n[vary]\n'
    of_sparsity = cells(tmp_path, head + '"sparsity.prune_rate" = [0.3, 0.5]\n')
    assert [(cell.seed, cell.setting, cell.recipe.dense) for cell in of_sparsity] == [
        (3, (), True),
        (4, (), True),
    ]
    assert len(cells(tmp_path, head + '"optimizer.momentum" = [0.5, 0.9]\n')) == 4


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


def test_a_recipe_beside_the_grid_is_found(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('model = "digits-cnn"\ndata = "digits"\nepochs = 9\n')
    (cell,) = cells(tmp_path, 'recipe = "mine.toml"\nmethods = ["set"]\ndensities = [0.1]\n')
    assert cell.recipe.epochs == 9


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("methods = [", RecipeError, "is not TOML"),
        ('methods = ["set"]', RecipeError, "It lacks the key 'recipe'"),
        ('recipe = "digits"\nmethod = ["set"]', RecipeError, "method"),
        ('recipe = "digits"\nmethods = ["set"]\ndensity = [0.1]', RecipeError, "unknown key 'density'"),
        ('recipe = "digits"\nmethods = []', RecipeError, "at least 1 item"),
        ('recipe = "digits"\nmethods = ["set"]\ndensities = [1.5]', RecipeError, "densities.0 is 1.5"),
        ('recipe = "digits"\nmethods = ["set"]', UsageError, "no densities for set"),
        ('recipe = "digit"\nmethods = ["set"]\ndensities = [0.1]', UnknownNameError, "Did you mean 'digits'"),
        ('recipe = "digits"\nmethods = ["sett"]\ndensities = [0.1]', RecipeError, "cell sett-0.1-seed0"),
        (
            'recipe = "digits"\nmethods = ["set"]\ndensities = [0.1]\n[vary]\n"sparsity.prune" = ["half"]',
            RecipeError,
            "cell set-0.1-prune=half-seed0",
        ),
        (
            'recipe = "digits"\nmethods = ["set"]\ndensities = [0.1]\n[method.rigl]\ndensities = [0.2]',
            UsageError,
            r"\[method.rigl\]",
        ),
        (
            'recipe = "digits"\nmethods = ["dense"]\n[method.dense]\ndensities = [0.2]',
            UsageError,
            "a dense twin has none",
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
