"""Which keys of a recipe have no say in its training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from sparse_export.train.recipe import Recipe
from sparse_export.train.sparsity_config import SparsityConfig


def unused_keys(recipe: Recipe) -> frozenset[str]:
    """Dotted keys that training by this recipe does not read, whatever their value, like
    "sparsity.prune_rate".

    Keys that a recipe refuses beside the others are not listed.
    """
    keys = set(_below("sparsity", _every_key() if recipe.dense else _of_sparsity(recipe.sparsity)))
    sgd = recipe.optimizer.name == "sgd"
    keys |= set(_below("optimizer", ("betas",) if sgd else ("momentum", "nesterov")))
    if recipe.learning_rate.schedule != "step":
        keys |= set(_below("learning_rate", ("drops", "factor")))
    return frozenset(keys)


def _every_key() -> Iterable[str]:
    return (field.name for field in fields(SparsityConfig))


def _below(table: str, keys: Iterable[str]) -> Iterable[str]:
    return (f"{table}.{key}" for key in keys)


def _of_sparsity(config: SparsityConfig) -> set[str]:
    keys = set(config.rule.accepts.unread)
    if config.start_density is None and config.rule.start_density is None:
        keys.add("falls_until")
    if config.pattern is None:
        keys.add("small_share")
    elif config.density is None:
        keys.add("start")  # as many in each layer as the pattern allows
    return keys
