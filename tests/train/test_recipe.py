"""Recipes: what can be said, and what an error says."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from sparse_export.cli.train import command
from sparse_export.errors import RecipeError, UnknownNameError
from sparse_export.formats.recipe_files import recipe_names
from sparse_export.sweep.grid import load_grid
from sparse_export.train.rates import learning_rate
from sparse_export.train.recipe import PRESETS, LearningRateRecipe, load_recipe, recipe_from_table


def test_the_shipped_recipes_are_there_and_right() -> None:
    assert recipe_names() == (
        "cifar10-alexnet-s",
        "cifar10-vgg-d",
        "cifar10-vgg-like",
        "cifar10-wrn-16-8",
        "cifar10-wrn-28-2",
        "digits",
        "fashion-mnist-lenet300-100",
        "fashion-mnist-lenet5",
        "imagenet-resnet50-10",
        "imagenet-resnet50-20",
        "mnist-lenet300-100",
        "mnist-lenet5",
    )
    for name in recipe_names():
        assert load_recipe(name).epochs > 0


def test_the_mnist_recipe_has_the_papers_settings() -> None:
    recipe = load_recipe("mnist-lenet300-100")
    optimizer = recipe.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.nesterov) == ("sgd", 0.1, 0.9, True)
    assert (optimizer.weight_decay, recipe.batch_size, recipe.epochs) == (5e-4, 100, 100)
    assert recipe.learning_rate == LearningRateRecipe(schedule="step", drops=(0.463, 0.926), factor=0.1)
    assert (recipe.sparsity.prune_rate, recipe.sparsity.prune_schedule) == (0.5, "cosine")


def test_preset_and_changes_are_laid_over_the_file() -> None:
    recipe = load_recipe("digits", preset="reference", changes={"epochs": 3, "sparsity": {"density": 0.5}})
    assert (recipe.epochs, recipe.sparsity.density) == (3, 0.5)
    assert (recipe.sparsity.start, recipe.sparsity.rescale) == ("uniform", False)


def test_every_preset_is_on_the_command_line_and_the_best_one_is_what_its_grid_measured() -> None:
    (option,) = (each for each in command.params if each.name == "preset")
    assert isinstance(option.type, click.Choice)
    assert [*option.type.choices] == [*PRESETS]
    grid = load_grid(Path(__file__).parents[2] / "benchmarks" / "grids" / "best.toml")
    assert grid.changes == PRESETS["best"]
    recipe = load_recipe("mnist-lenet300-100", preset="best", changes={"sparsity": {"density": 0.01}})
    assert recipe.sparsity.wanted_start_density == 0.5


def test_a_required_key_that_is_misspelt_is_named() -> None:
    with pytest.raises(RecipeError, match="unknown key 'epoch'; the nearest known one is 'epochs'"):
        recipe_from_table({"model": "lenet5", "data": "mnist", "epoch": 3}, source="mine.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('modle = "x"', r"unknown key 'modle'; the nearest known one is 'model'"),
        ("[sparsity]\ndensty = 0.1", r"unknown key 'sparsity\.densty'; the nearest known one is 'density'"),
        ('epochs = "20"', r"epochs is '20': input should be a valid integer"),
        ("epochs = 0", r"epochs is 0: input should be greater than or equal to 1"),
        (
            "[sparsity]\ndensity = 1.5",
            r"In \[sparsity\], density is 1\.5\. A number above 0 and up to 1 was expected\.$",
        ),
        ("[sparsity]\ndensity = nan", r"In \[sparsity\], density is nan\."),
        ("[sparsity]\ndensity = -inf", r"In \[sparsity\], density is -inf\."),
        ("[optimizer]\nlr = inf", r"optimizer\.lr is inf: a finite number was expected\.$"),
        (
            '[sparsity]\npattern = "4:2"',
            r"right\. In \[sparsity\], pattern is '4:2': N:M with 1 <= N < M was expected, like 2:4\.$",
        ),
        ('[sparsity]\nmethod = "asp"', r"In \[sparsity\], method 'asp' needs a pattern, like '2:4'\.$"),
        (
            'ema = 0.5\n[sparsity]\nmethod = "sr-ste"\npattern = "2:4"',
            r"It is refused: ema and method 'sr-ste' exclude each other: [a-z ]+\.$",
        ),
        ('[sparsity]\nmethod = "static"\ngrowth = "random"', r"In \[sparsity\], growth is.* method\.$"),
        ("[sparsity]\napproach = [0.1]", r"sparsity\.approach has too few values\.$"),
        ("epochs = {a = 1}", r"epochs is a table: input should be a valid integer\.$"),
        ('[sparsity]\nstart = "er"', r"sparsity\.start is 'er'.*'uniform'"),
        ('seed = "a"', r"seed is 'a'"),
        (
            '[sparsity]\nprune_schedule = "constant"\nfinal_prune_rate = 0.1',
            r"final_prune_rate is 0\.1, and the prune schedule is 'constant'",
        ),
        ("sparsity = 3", r"sparsity is 3"),
        ("epochs = [", r"is not TOML"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused_by_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.toml"
    base = {"model": "lenet5", "data": "mnist", "epochs": 1}
    head = "".join(f"{key} = {value!r}\n" for key, value in base.items() if not text.startswith(key))
    file.write_text(head + text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(file)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text('model = "lenet5"\nepochs = 1\n')
    with pytest.raises(RecipeError, match="lacks the key 'data'"):
        load_recipe(file)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'digits'"):
        load_recipe("digit")


def test_the_step_schedule_drops_where_the_paper_says() -> None:
    recipe = LearningRateRecipe()
    rates = [learning_rate(step, 1000, 0.1, recipe) for step in (0, 462, 463, 925, 926, 999)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_the_rate_warms_up_to_where_its_schedule_stands() -> None:
    recipe = LearningRateRecipe(schedule="constant", warmup=0.1)
    rates = [learning_rate(step, 100, 0.2, recipe) for step in (0, 4, 9, 10, 99)]
    assert rates == pytest.approx([0.02, 0.1, 0.2, 0.2, 0.2])


def test_the_cifar_recipes_drop_the_rate_after_30000_and_60000_steps() -> None:
    recipe = load_recipe("cifar10-vgg-like")
    steps = recipe.epochs * (45_000 // recipe.batch_size)
    assert [round(drop * steps, -3) for drop in recipe.learning_rate.drops] == [30_000, 60_000]
    assert recipe.augment == "crop-flip"


def test_cosine_falls_to_zero_and_constant_stays() -> None:
    cosine = LearningRateRecipe(schedule="cosine")
    assert [learning_rate(s, 100, 0.2, cosine) for s in (0, 50, 100)] == pytest.approx(
        [0.2, 0.1, 0.0], abs=1e-12
    )
    assert learning_rate(77, 100, 0.2, LearningRateRecipe(schedule="constant")) == 0.2
