"""Which weights die: the smallest magnitudes of each layer."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_export.sparsity.select import largest


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


def survivors(weight: Tensor, mask: Tensor, n_kept: Tensor) -> Tensor:
    """The mask that keeps the `n_kept` largest |weight| among the active ones; on ties the lower index.

    weight: float, any shape.  mask: bool, the same shape.  n_kept: int64, shape ().  Returns bool.
    """
    return largest(weight, mask, n_kept)
