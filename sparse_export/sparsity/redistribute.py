"""How many weights each layer gets back."""

from __future__ import annotations

import torch
from torch import Tensor


def shares_from_statistic(statistic: Tensor, n_active: Tensor) -> Tensor:
    """Each layer's share of the growth budget.

    statistic: float64 (L,), non-negative.  n_active: int64 (L,).
    Returns float64 (L,) that sums to 1. When every statistic is zero, or one is not finite, the shares follow
    the active counts, which gives each layer about what it lost.
    """
    total = statistic.sum()
    usable = (total > 0) & total.isfinite()
    active = n_active.double()
    n_all = active.sum()
    even = torch.full_like(active, 1 / active.numel())
    fallback = torch.where(n_all > 0, active / n_all.clamp(min=1), even)
    return torch.where(usable, statistic / torch.where(usable, total, 1.0), fallback)


def growth_budgets(shares: Tensor, n_removed: Tensor, capacity: Tensor) -> Tensor:
    """Divide the removed weights over the layers by share, no layer above its free positions.

    shares: float64 (L,), sums to 1.  n_removed: int64 (), the whole budget.  capacity: int64 (L,), sums to at
    least the budget.
    Returns int64 (L,), sums to exactly `n_removed`. What a full layer cannot take is spread equally over the
    others (the reference's rule, here solved in closed form): layer n gets min(capacity_n, share_n * removed
    + e) with the one e that spends the budget. Whole numbers by largest remainder; on equal remainders the
    earlier layer.
    """
    n_layers = shares.numel()
    base = shares * n_removed.double()
    room, _ = (capacity.double() - base).sort()
    # A sum over a triangle: cumsum of floats is refused on CUDA where a user wants deterministic algorithms.
    spent_below = torch.where(torch.ones_like(room).expand(n_layers, -1).tril(-1) > 0, room, 0.0).sum(1)
    n_above = torch.arange(n_layers, 0, -1, dtype=torch.float64, device=room.device)
    # Overspent if e were this layer's room: those below are full, those from here on take e each.
    balance = spent_below + room * n_above
    first = (balance < 0).sum().clamp(max=n_layers - 1).reshape(1)
    extra = -spent_below.gather(0, first) / n_above.gather(0, first)
    ideal = torch.minimum(base + extra, capacity.double()).clamp(min=0)

    whole = torch.minimum(ideal.floor().long(), capacity)
    remainder = torch.where(whole < capacity, ideal - whole.double(), -1.0)
    order = remainder.argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(n_layers, device=order.device))
    return whole + (rank < n_removed - whole.sum()).long()
