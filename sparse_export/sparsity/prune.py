"""Which weights die: the smallest magnitudes of each layer, of all layers, or those below a threshold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from sparse_export.sparsity.select import largest, largest_in_each

Prune = Literal["magnitude", "global-magnitude", "threshold"]

FIRST_THRESHOLD = 1e-3
_TOLERANCE = 0.1


def layer_prune_rates(shares: Tensor, n_active: Tensor, n_weights: Tensor, rate: float) -> Tensor:
    """The prune rate of each layer: `rate`, less for a nearly full layer that still attracts weights.

    shares: float64 (L,), sums to 1.  n_active, n_weights: int64 (L,).
    Where under a fifth of a layer is free and its share is above average, it loses at most its free fraction.
    Returns float64 (L,). Source: sparse_learning core.py (the paper has min(rate, sparsity) for such layers).
    """
    free = (n_weights - n_active).double() / n_weights.double()
    spared = (free < 0.2) & (shares > 1 / shares.numel())
    return torch.where(spared, free.clamp(max=rate), torch.full_like(free, rate))


def prune_counts(rates: Tensor, n_active: Tensor) -> Tensor:
    """How many weights each layer loses: ceil(rate * active). float64 (L,), int64 (L,) -> int64 (L,)."""
    return torch.minimum((rates * n_active.double()).ceil().long(), n_active)


def survivors(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], n_kept: Tensor
) -> dict[str, Tensor]:
    """The masks that keep the `n_kept` largest |weight| among the active ones of every layer; on ties the
    lower index.

    weights: float, masks: bool, by name in one order, shapes alike.  n_kept: int64 (L,).  Returns bool by
    name.
    """
    return largest_in_each(weights, masks, n_kept)


def largest_of_all(
    values: Mapping[str, Tensor], candidates: Mapping[str, Tensor], count: Tensor
) -> dict[str, Tensor]:
    """Mark the `count` candidates of largest |value| over all layers together; on ties the earlier layer and
    index.

    values: float, candidates: bool, by name in one order, shapes alike.  count: int64, shape ().
    """
    chosen = largest(
        torch.cat([values[name].detach().flatten() for name in candidates]),
        torch.cat([mask.flatten() for mask in candidates.values()]),
        count,
    )
    parts = chosen.split([mask.numel() for mask in candidates.values()])
    return {name: part.view(candidates[name].shape) for name, part in zip(candidates, parts, strict=True)}


def survivors_above(weight: Tensor, mask: Tensor, threshold: Tensor) -> Tensor:
    """The mask without the active weights whose magnitude is below the threshold. threshold: float64, shape
    ().

    NaN survives, so that whoever looks next sees it.
    """
    return mask & ~(weight.abs() < threshold)


def next_threshold(threshold: Tensor, n_removed: Tensor, n_wanted: Tensor) -> Tensor:
    """The threshold for the next update: doubled when it took too few weights, halved when too many, by a
    tenth.

    threshold: float64, shape ().  n_removed, n_wanted: int64, shape ().
    Source: Mostafa & Wang 2019, "Parameter efficient training of deep convolutional neural networks by
    dynamic sparse reparameterization", algorithm 1.
    """
    too_few = n_removed.double() < (1 - _TOLERANCE) * n_wanted.double()
    too_many = n_removed.double() > (1 + _TOLERANCE) * n_wanted.double()
    return torch.where(too_few, 2 * threshold, torch.where(too_many, threshold / 2, threshold))
