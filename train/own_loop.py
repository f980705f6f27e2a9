"""The settings of a trainer for anybody's loop, as keywords, made a configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from sparse_export.errors import UnknownNameError, UsageError
from sparse_export.sparsity import pattern_from_text
from sparse_export.train.arguments import require_steps, require_texts, require_whole
from sparse_export.train.methods import OWN_LOOP_METHODS, method_named
from sparse_export.train.optimizer_state import MomentumOf
from sparse_export.train.sparsity_config import DEFAULT_APPROACH, SparsityConfig

__all__ = ["BY_MAGNITUDE", "FirstMasks", "Given", "own_loop_config", "require_length", "require_types"]


BY_MAGNITUDE = "magnitude"
_UPDATE_EVERY = 500  # steps, in a training that is long enough
_FEWEST_UPDATES = 20  # wanted in a shorter one
FirstMasks = Mapping[str, Tensor] | Literal["magnitude"]


class Given(NamedTuple):
    """What `SparseTraining` is made with beside a configuration, see there."""

    total_steps: int | None
    seed: int
    output_layers: Sequence[str] | None
    masks: FirstMasks | None
    process_group: Any
    unfit: Mapping[str, str] | None
    momentum_of: MomentumOf | None


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
    own = method_named(method)
    if method not in OWN_LOOP_METHODS:
        raise UnknownNameError("method", method, OWN_LOOP_METHODS)
    if settings["update_every"] == "auto":
        settings["update_every"] = _interval(total_steps)
    require_steps("update_every", settings["update_every"])
    if settings["density"] is None and settings["pattern"] is None and not has_masks:
        raise UsageError("Neither a density nor a pattern was given.", expected="At least one was expected.")
    if settings["density"] is not None and has_masks:
        raise UsageError(
            "Masks and a density were given.", expected="One of them was expected: masks have a density."
        )
    require_length(settings["freeze"], total_steps)
    require_texts("keep_dense", settings["keep_dense"])
    if settings["freeze"] is None and own.accepts.freeze:
        settings["freeze"] = own.freeze
    approach = tuple(approach) if isinstance(approach, list) else approach
    settings["approach"] = None if approach == DEFAULT_APPROACH else approach
    settings["prune_schedule"] = settings["prune_schedule"] or ("cosine" if total_steps else "constant")
    settings["update_every"] = settings["update_every"] or 0
    settings["keep_dense"] = tuple(settings["keep_dense"])
    return SparsityConfig(**settings)


def _interval(total_steps: int | None) -> int:
    """Steps between updates where they are not told; of a short training such that there are twenty."""
    if not isinstance(total_steps, Integral) or total_steps < 1:
        return _UPDATE_EVERY
    return min(_UPDATE_EVERY, max(1, int(total_steps) // _FEWEST_UPDATES))


def require_length(freeze: float | None, total_steps: int | None) -> None:
    """Raise UsageError for a fraction of a training whose length is not known."""
    if freeze is not None and total_steps is None:
        raise UsageError(
            f"freeze is {freeze!r}, a fraction of a training whose length is not known.",
            do="Give total_steps, or leave out freeze.",
        )


def require_types(model: object, given: Given) -> None:
    """Raise UsageError for arguments of another type, and output layers that there are not."""
    if not isinstance(model, nn.Module):
        raise UsageError(f"{type(model).__name__} is no network.", expected="A torch.nn.Module was expected.")
    require_whole("seed", given.seed)
    if given.output_layers is not None:
        require_texts("output_layers", given.output_layers)
        known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        for name in given.output_layers:
            if name not in known:
                raise UsageError(f"output_layers names {name!r}, which is no parameter of the network.")
    masks: object = given.masks
    if (
        masks is not None
        and not (isinstance(masks, str) and masks == BY_MAGNITUDE)
        and not (isinstance(masks, Mapping) and all(isinstance(one, Tensor) for one in masks.values()))
    ):
        raise UsageError(
            f"masks is {masks!r}." if isinstance(masks, str) else f"masks is of type {type(masks).__name__}.",
            expected=f"Tensors by parameter name, or {BY_MAGNITUDE!r}, were expected.",
        )
    if given.momentum_of is not None and not callable(given.momentum_of):
        raise UsageError(
            f"momentum_of is {given.momentum_of!r}.",
            expected="A function of an optimizer and a parameter was expected.",
        )
