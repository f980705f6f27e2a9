"""Keys that a training does not read: each changes not a bit of it, and each other key does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sparse_export.errors import RecipeError
from sparse_export.sweep.unused import unused_keys
from sparse_export.train.factory import make_sparsifier
from sparse_export.train.optimizer import make_optimizer
from sparse_export.train.rates import learning_rate
from sparse_export.train.recipe import Recipe, recipe_from_table
from sparse_export.train.stopping import cpu_settings

STEPS = 24
BASE: dict[str, Any] = {
    "model": "digits-cnn",
    "data": "digits",
    "epochs": 1,
    "optimizer": {"lr": 0.05},
    "sparsity": {"update_every": 4},
}
OTHERS: dict[str, Any] = {
    "optimizer.momentum": 0.5,
    "optimizer.nesterov": False,
    "optimizer.betas": [0.7, 0.9],
    "optimizer.weight_decay": 0.1,
    "learning_rate.drops": [0.1, 0.2],
    "learning_rate.factor": 0.3,
    "learning_rate.warmup": 0.5,
    "sparsity.prune_rate": 0.2,
    "sparsity.final_prune_rate": 0.45,
    "sparsity.prune_schedule": "constant",
    "sparsity.update_every": 6,
    "sparsity.history": 0.99,
    "sparsity.falls_until": 0.4,
    "sparsity.start": "uniform",
    "sparsity.rescale": False,
    "sparsity.decay": 0.05,
    "sparsity.small_share": 0.5,
    "sparsity.keep_dense": ["2"],
}
"""A value of each key that is not the default."""

SPARSE: dict[str, dict[str, Any]] = {
    **{
        method: {"method": method, "density": 0.2}
        for method in ("sparse-momentum", "set", "rigl", "static", "snip", "magnitude")
    },
    "dsr": {
        "method": "dsr",
        "density": 0.2,
        "update_every": 1,
    },  # its threshold takes some updates to get anywhere
    "linear": {"density": 0.2, "prune_schedule": "linear"},
    # Grown weights are the smallest for long, whatever their history is, so there have to be many updates.
    "random": {"density": 0.2, "growth": "random", "redistribution": "none", "update_every": 1},
    **{
        f"{method} 2:4": {"method": method, "pattern": "2:4"}
        for method in ("sparse-momentum", "static", "sr-ste", "asp")
    },
    "sparse-momentum 2:4 0.2": {"pattern": "2:4", "density": 0.2},
}


def changed(table: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    above, _, below = key.rpartition(".")
    return {**table, above: {**table.get(above, {}), below: value}} if above else {**table, key: value}


def trained(recipe: Recipe) -> list[torch.Tensor]:
    """The weights of a small network after a few steps by the recipe."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 4))
    x = torch.randn(16, 16)
    y = x[:, :4].argmax(1)

    def loss() -> torch.Tensor:
        return nn.functional.cross_entropy(model(x), y)

    optimizer: Any = make_optimizer(recipe.optimizer, model)
    if not recipe.dense:
        optimizer = make_sparsifier(recipe, model, optimizer, STEPS, first_loss=loss)
    inner = getattr(optimizer, "optimizer", optimizer)
    with cpu_settings(1):  # threads would wait for each other longer than they work
        for step in range(STEPS):
            for group in inner.param_groups:
                group["lr"] = learning_rate(step, STEPS, recipe.optimizer.lr, recipe.learning_rate)
            model.zero_grad()
            loss().backward()
            optimizer.step()
    return [value.detach().clone() for value in model.parameters()]


@pytest.mark.parametrize(
    "table",
    [
        *({"sparsity": {**BASE["sparsity"], **settings}} for settings in SPARSE.values()),
        {"dense": True},
        {"dense": True, "optimizer": {"name": "adam", "lr": 0.01}},
        {"dense": True, "learning_rate": {"schedule": "cosine"}},
    ],
    ids=[*SPARSE, "dense", "adam", "cosine"],
)
def test_a_key_is_unused_just_where_it_changes_nothing(table: dict[str, Any]) -> None:
    table = {**BASE, **table}
    recipe = recipe_from_table(table, source="the test")
    unused, before = unused_keys(recipe), trained(recipe)
    assert all(torch.equal(a, b) for a, b in zip(before, trained(recipe), strict=True))
    found, listed = set(), set()
    for key, value in OTHERS.items():
        try:
            other = recipe_from_table(changed(table, key, value), source="the test")
        except RecipeError:
            continue  # refused, so there is no need to list it
        if other == recipe:
            continue
        if all(torch.equal(a, b) for a, b in zip(before, trained(other), strict=True)):
            found.add(key)
        if key in unused:
            listed.add(key)
    assert listed == found
