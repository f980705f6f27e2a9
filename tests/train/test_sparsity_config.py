"""The one configuration that recipe, trainer and command line share."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from sparse_export.errors import RecipeError, UsageError
from sparse_export.sparsity import NMPattern
from sparse_export.train import SparseTraining, SparsityConfig
from sparse_export.train.methods import METHODS, OWN_LOOP_METHODS
from sparse_export.train.recipe import recipe_from_table

RUN = {"model": "digits-cnn", "data": "digits", "epochs": 1}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))


def test_the_class_documents_every_setting_once() -> None:
    settings, _, _ = (SparsityConfig.__doc__ or "").partition("Raises:")
    assert re.findall(r"^ {8}(\w+): ", settings, re.MULTILINE) == [
        field.name for field in fields(SparsityConfig)
    ]


def test_a_recipe_holds_the_configuration_and_writes_it_as_it_was_given() -> None:
    table = {"method": "set", "pattern": "2:4", "approach": [0.1, 0.5], "keep_dense": ["fc1"]}
    recipe = recipe_from_table({**RUN, "sparsity": table}, source="the test")
    assert recipe.sparsity == SparsityConfig(
        method="set", pattern=NMPattern(n=2, m=4), approach=(0.1, 0.5), keep_dense=("fc1",)
    )
    document = recipe.model_dump(mode="json")["sparsity"]
    assert {key: document[key] for key in table} == table
    assert list(document) == [field.name for field in fields(SparsityConfig)]


@pytest.mark.parametrize(
    "settings",
    [
        {"density": 1.5},
        {"density": float("nan")},
        {"prune_rate": -0.1},
        {"freeze": 2.0},
        {"small_share": 2.0},
        {"decay": float("inf")},
        {"update_every": -1},
        {"window": 0, "products": "csr"},
        {"window": 3},
        {"final_prune_rate": 0.1, "prune_schedule": "constant"},
        {"approach": (0.1, 0.2)},
        {"method": "static", "growth": "random"},
        {"method": "asp"},
        {"transposable": True},
        {"products": "2:4"},
    ],
    ids=str,
)
def test_recipe_and_class_refuse_the_same_in_the_same_words(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as direct:
        SparsityConfig(**settings)
    with pytest.raises(RecipeError) as by_recipe:
        recipe_from_table({**RUN, "sparsity": settings}, source="the test")
    assert f"In [sparsity], {direct.value}" in str(by_recipe.value)


def test_a_configuration_cannot_be_changed_and_a_copy_is_checked() -> None:
    config = SparsityConfig(density=0.1)
    with pytest.raises(FrozenInstanceError):
        config.density = 0.2  # type: ignore[misc]
    with pytest.raises(UsageError, match="density is 2"):
        replace(config, density=2.0)


@pytest.mark.parametrize("method", [name for name in OWN_LOOP_METHODS if METHODS[name].start == "random"])
def test_keywords_and_the_configuration_that_they_stand_for_make_one_trainer(method: str) -> None:
    def optimizer(model: nn.Module) -> SGD:
        return SGD(model.parameters(), lr=0.1, momentum=0.9)

    first, second = network(), network()
    by_keywords = SparseTraining(
        first, optimizer(first), method=method, density=0.2, total_steps=40, update_every=5, seed=3
    )
    config = SparsityConfig(method=method, density=0.2, update_every=5)  # type: ignore[arg-type]
    by_config = SparseTraining.from_config(second, optimizer(second), config, total_steps=40, seed=3)
    assert all(torch.equal(mask, by_config.masks[name]) for name, mask in by_keywords.masks.items())
    for name in ("density", "n_active", "update_every", "prune_rate", "prune_schedule", "is_frozen", "rule"):
        assert getattr(by_keywords, name) == getattr(by_config, name), name
