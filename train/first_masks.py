"""The masks that a training starts with: all weights, drawn at random, by magnitude, or given."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sparse_export.errors import UsageError
from sparse_export.sparsity import layer_counts, random_masks
from sparse_export.sparsity.caps import under_cap
from sparse_export.sparsity.pattern import obeys
from sparse_export.sparsity.select import largest
from sparse_export.sparsity.transposable import transposable_mask
from sparse_export.train.density_fall import DensityFall
from sparse_export.train.masked_layers import MaskedLayers
from sparse_export.train.methods import Method
from sparse_export.train.sparsity_config import SparsityConfig
from sparse_export.train.transposable import random_transposable, require_transposable
from sparse_export.train.update_schedule import UpdateSchedule

__all__ = ["checked_masks", "first_masks", "require_start", "rescale_weights"]


def require_start(
    method: Method, schedule: UpdateSchedule, fall: DensityFall | None, masks: Mapping[str, Tensor] | None
) -> None:
    """Raise UsageError where a method has not what it starts or goes by."""
    if method.start == "sensitivity" and masks is None:
        raise UsageError(
            f"The method is {method.name!r}, and there are no masks.",
            expected="Those of sparse_export.train.methods.snip.snip_masks were expected.",
        )
    if fall is not None and (masks is not None or schedule.end == 0):
        raise UsageError(
            f"The density of method {method.name!r} falls over the length of the training.",
            expected="total_steps, a freeze above 0 and no masks were expected.",
        )


def first_masks(
    layers: MaskedLayers, config: SparsityConfig, seed: int, *, by_magnitude: bool = False
) -> dict[str, Tensor]:
    """Masks as the method starts with them, on the CPU.

    Args:
        layers: whose masks they are.
        config: its method, and how they are spread over the layers.
        seed: of what is drawn.
        by_magnitude: keep the largest weights that are there, in place of drawn ones.

    Raises:
        UsageError: a weight is not finite, and masks are chosen by magnitude.
    """
    shapes = layers.shapes
    first = config.wanted_start_density
    if first == 1:
        return {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
    n = layers.n_at(0)
    counts = limits = layers.limits(n)
    if layers.n_wanted is not None:
        density = layers.n_wanted / layers.n_weights if first is None else first
        counts = layer_counts(shapes, density, config.start, limits=limits)
    generator = torch.Generator().manual_seed(seed)
    if by_magnitude:
        return _largest_weights(layers, counts, n, generator)
    drawn = random_masks(shapes, counts, generator, caps=layers.caps(n))
    if layers.is_down(n):
        for name in layers.transposable:
            drawn[name] = random_transposable(shapes[name], generator)
    return drawn


def _largest_weights(
    layers: MaskedLayers, counts: Mapping[str, int], n: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Masks of the largest |weights| of each layer, of each group under a pattern.

    Weights that are 0 come last, in an order that is drawn. Where all others have room in the masks together,
    as those of a network that was trained sparse, they all stay, and layers give weights to each other.

    Args:
        layers: whose weights are looked at.
        counts: active weights of each.
        n: the pattern's cap.
        generator: of the order of zeros.

    Raises:
        UsageError: a weight is not finite.
    """
    caps, tiled = layers.caps(n), layers.transposable if layers.is_down(n) else ()
    masks, ranked, allowed, n_nonzero = {}, {}, {}, {}
    for name, weight in layers.weights().items():
        values = weight.detach().float().cpu().contiguous()
        if not values.isfinite().all():
            raise UsageError(
                f"{name} holds NaN or infinity, and masks are chosen by magnitude.",
                expected="Finite weights were expected.",
                do="Load the weights of a training that did not diverge.",
            )
        if name in tiled:
            masks[name] = transposable_mask(values.flatten(1)).view(values.shape)
            continue
        ranked[name] = _zeros_drawn(values, generator)
        allowed[name] = torch.ones_like(values, dtype=torch.bool)
        if name in caps:
            allowed[name] = under_cap(ranked[name], allowed[name], caps[name])
        n_nonzero[name] = int(torch.count_nonzero(values[allowed[name]]))
    counts = _with_room_for(n_nonzero, {name: counts[name] for name in n_nonzero})
    masks |= {name: largest(ranked[name], allowed[name], torch.tensor(counts[name])) for name in ranked}
    return {name: masks[name] for name in layers.shapes}


def _zeros_drawn(values: Tensor, generator: torch.Generator) -> Tensor:
    """Magnitudes, with numbers below the smallest of them in place of 0."""
    is_zero = values == 0
    if not is_zero.any():
        return values.abs()
    magnitudes = values.abs().double()
    least = 1.0 if is_zero.all() else float(magnitudes[~is_zero].min())
    drawn = torch.rand(values.shape, generator=generator, dtype=torch.float64)
    return torch.where(is_zero, least / 2 * drawn, magnitudes)


def _with_room_for(wanted: Mapping[str, int], counts: Mapping[str, int]) -> dict[str, int]:
    """Counts of the same sum, none below what is wanted; as they are where the sum is too small for that."""
    spare = {name: max(0, counts[name] - n) for name, n in wanted.items()}
    n_missing = sum(max(0, n - counts[name]) for name, n in wanted.items())
    n_spare = sum(spare.values())
    if not n_missing or n_missing > n_spare:
        return dict(counts)
    given = {name: n_missing * n // n_spare for name, n in spare.items()}
    n_left = n_missing - sum(given.values())  # fewer than layers that have something to spare
    for name in sorted(spare, key=lambda one: given[one] - spare[one])[:n_left]:
        given[name] += 1
    return {name: max(n, wanted[name]) - given[name] for name, n in counts.items()}


def checked_masks(layers: MaskedLayers, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks that were given, bool. Raises UsageError where they belong to other layers or exceed the cap."""
    have = layers.shapes
    got = {name: tuple(mask.shape) for name, mask in masks.items()}
    if have != got:
        raise UsageError(f"The masks are for {got}.", expected=f"Masks for {have} were expected.")
    caps = layers.caps(layers.n_at(0))
    over = [name for name, cap in caps.items() if not obeys(masks[name], cap.axis, cap.pattern)]
    if over:
        raise UsageError(
            f"The masks of {', '.join(over)} do not satisfy the pattern.",
            expected="Masks within the pattern were expected.",
            do="Leave out the masks, or keep the N largest weights of each group in them.",
        )
    require_transposable(masks, layers.transposable)
    return dict(masks)


@torch.no_grad()
def rescale_weights(layers: MaskedLayers, masks: Mapping[str, Tensor]) -> None:
    """Multiply each layer's weights by 1 / sqrt(its density), in place: its outputs keep their variance."""
    for name, weight in layers.parameters.items():
        density = int(masks[name].sum()) / weight.numel()
        if density > 0:
            weight.mul_(1 / math.sqrt(density))
