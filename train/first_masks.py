"""The masks that a training starts with: all weights, drawn at random, or given."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sparse_export.errors import UsageError
from sparse_export.sparsity import Distribution, NMPattern, layer_counts, random_masks
from sparse_export.sparsity.pattern import obeys
from sparse_export.train.masked_layers import MaskedLayers
from sparse_export.train.methods import Method
from sparse_export.train.transposable import drawn_both_ways, require_both_ways
from sparse_export.train.update_schedule import UpdateSchedule

__all__ = ["checked_masks", "first_masks", "require_start", "rescale_weights"]


def require_start(
    name: str,
    method: Method,
    schedule: UpdateSchedule,
    masks: Mapping[str, Tensor] | None,
    pattern: NMPattern | None,
) -> None:
    """Raise UsageError where a method, of this name, has not what it starts or goes by."""
    if pattern is not None and method.start != "random":
        raise UsageError(
            f"The method is {name!r}, and there is a pattern, {pattern}.",
            expected="A method that starts with random masks was expected under a pattern.",
            do="Leave out the pattern, or choose another method; asp prunes a dense network to a pattern.",
        )
    if method.start == "sensitivity" and masks is None:
        raise UsageError(
            f"The method is {name!r}, and there are no masks.",
            expected="Those of sparse_export.train.snip.snip_masks were expected.",
        )
    if method.is_gradual and (masks is not None or schedule.end == 0):
        raise UsageError(
            f"The method is {name!r}, which goes from dense to sparse over the length of the training.",
            expected="total_steps, a freeze above 0 and no masks were expected.",
        )


def first_masks(layers: MaskedLayers, method: Method, start: Distribution, seed: int) -> dict[str, Tensor]:
    """Masks as the method starts with them, on the CPU. start: how they are spread over the layers."""
    shapes = layers.shapes
    if method.is_gradual:
        return {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
    n = layers.n_at(0)
    counts = limits = layers.limits(n)
    if layers.n_wanted is not None:
        counts = layer_counts(shapes, layers.n_wanted / layers.n_weights, start, limits=limits)
    generator = torch.Generator().manual_seed(seed)
    drawn = random_masks(shapes, counts, generator, caps=layers.caps(n))
    if layers.is_down(n):
        for name in layers.both_ways:
            drawn[name] = drawn_both_ways(shapes[name], generator)
    return drawn


def checked_masks(layers: MaskedLayers, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks that were given, bool. Raises UsageError when they are others' or over the cap."""
    have = layers.shapes
    got = {name: tuple(mask.shape) for name, mask in masks.items()}
    if have != got:
        raise UsageError(f"The masks are for {got}.", expected=f"Masks for {have} were expected.")
    caps = layers.caps(layers.n_at(0))
    over = [name for name, cap in caps.items() if not obeys(masks[name], cap.axis, cap.pattern)]
    if over:
        raise UsageError(
            f"The masks of {', '.join(over)} do not obey the pattern.",
            expected="Masks within the pattern were expected.",
            do="Leave out the masks, or keep the N largest weights of each group in them.",
        )
    require_both_ways(masks, layers.both_ways)
    return dict(masks)


@torch.no_grad()
def rescale_weights(layers: MaskedLayers, masks: Mapping[str, Tensor]) -> None:
    """Multiply each layer's weights by 1 / sqrt(its density), in place, which keeps the variance of its outputs."""
    for name, weight in layers.parameters.items():
        density = int(masks[name].sum()) / weight.numel()
        if density > 0:
            weight.mul_(1 / math.sqrt(density))
