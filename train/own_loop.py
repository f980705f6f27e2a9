"""The settings of a trainer for anybody's loop, as keywords, made a configuration."""

from __future__ import annotations

from typing import Any

from sparse_export.errors import UnknownNameError, UsageError
from sparse_export.sparsity import pattern_from_text
from sparse_export.train.arguments import require_steps
from sparse_export.train.methods import OWN_LOOP_METHODS, method_named
from sparse_export.train.sparsity_config import DEFAULT_APPROACH, SparsityConfig

__all__ = ["own_loop_config"]


def own_loop_config(*, total_steps: int | None, has_masks: bool, **settings: Any) -> SparsityConfig:
    """The configuration that the keywords of `SparseTraining` stand for.

    Args:
        total_steps: length of the training; None where it is not known.
        has_masks: are there masks to start with?
        settings: those keywords that are settings of `SparsityConfig`, all of them.

    Raises:
        UsageError: a setting is out of its range, or settings contradict each other.
    """
    method, approach = settings["method"], settings["approach"]
    if isinstance(settings["pattern"], str):
        settings["pattern"] = pattern_from_text(settings["pattern"])
    if method not in OWN_LOOP_METHODS:
        raise UnknownNameError("method", method, OWN_LOOP_METHODS)
    require_steps("update_every", settings["update_every"])
    if settings["density"] is None and settings["pattern"] is None and not has_masks:
        raise UsageError("Neither a density nor a pattern was given.", expected="At least one was expected.")
    if settings["density"] is not None and has_masks:
        raise UsageError(
            "Masks and a density were given.", expected="One of them was expected: masks have a density."
        )
    own = method_named(method)
    if settings["freeze"] is None and own.accepts.freeze:
        settings["freeze"] = own.freeze
    settings["approach"] = None if approach == DEFAULT_APPROACH else approach
    settings["prune_schedule"] = settings["prune_schedule"] or ("cosine" if total_steps else "constant")
    settings["update_every"] = settings["update_every"] or 0
    settings["keep_dense"] = tuple(settings["keep_dense"])
    return SparsityConfig(**settings)
