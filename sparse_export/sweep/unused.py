"""Which keys of a recipe have no say in its training."""

from __future__ import annotations

from collections.abc import Iterable

from sparse_export.train.methods import chosen_method
from sparse_export.train.recipe import Recipe, SparsityRecipe

_RATE = ("prune_rate", "final_prune_rate", "prune_schedule")
_START = ("start", "rescale")


def unused_keys(recipe: Recipe) -> frozenset[str]:
    """Dotted keys that training by this recipe does not read, whatever their value, like "sparsity.prune_rate".

    Keys that a recipe refuses beside the others are not listed.
    """
    keys = set(_below("sparsity", SparsityRecipe.model_fields if recipe.dense else _of_sparsity(recipe)))
    sgd = recipe.optimizer.name == "sgd"
    keys |= set(_below("optimizer", ("betas",) if sgd else ("momentum", "nesterov")))
    if recipe.learning_rate.schedule != "step":
        keys |= set(_below("learning_rate", ("drops", "factor")))
    return frozenset(keys)


def _below(table: str, keys: Iterable[str]) -> Iterable[str]:
    return (f"{table}.{key}" for key in keys)


def _of_sparsity(recipe: Recipe) -> set[str]:
    settings = recipe.sparsity
    keys: set[str] = set()
    if settings.pattern is None:
        keys.add("small_share")
    elif settings.density is None:
        keys.add("start")  # as many in each layer as the pattern allows
    if settings.method == "sr-ste":
        return keys | {*_RATE, *_START, "update_every"}
    keys.add("decay")
    if settings.method == "asp":
        return keys | {*_RATE, *_START, "update_every"}
    rule = chosen_method(
        settings.method, prune=settings.prune, redistribution=settings.redistribution, growth=settings.growth
    )
    if not rule.moves:
        keys |= {*_RATE, "update_every"}
    if rule.is_gradual:
        keys |= set(_RATE)
    if rule.start != "random":
        keys |= set(_START)
    return keys
