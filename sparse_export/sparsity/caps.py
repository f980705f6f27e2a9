"""A layer's cap: at most N of every M active along its reduction axis, and what there is room for under
it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_export.sparsity.pattern import NMPattern, grouped, ungrouped

# Up to this M the members of a group are ranked by comparing each with each. Sorting rows so short took 2.0
# times as long at M = 4, 3.3 at 8, 1.9 at 32 (4 M values, one core of an AMD EPYC, torch 2.14.1, 2026-11-25).
_COMPARED = 32


@dataclass(frozen=True, kw_only=True)
class Cap:
    """A pattern and the axis of a weight that its groups run along."""

    pattern: NMPattern
    axis: int


def under_cap(weight: Tensor, mask: Tensor, cap: Cap) -> Tensor:
    """The mask without what is over the cap: of each group the N active weights of largest |weight| stay.

    weight: float.  mask: bool, the same shape, whose axis M divides. Of equal weights the lower index stays.
    Returns bool; a mask that obeys the cap comes back as it was.
    """
    return mask & _leading(weight, mask, cap, None)


def growth_candidates(scores: Tensor, mask: Tensor, cap: Cap) -> Tensor:
    """The inactive positions that may be grown: of each group as many as it has room for, by |score|.

    scores: float.  mask: bool, the same shape, obeying the cap. Of equal scores the lower index.
    Returns bool. The k candidates of largest |score| are, for every k, the best choice of k positions in all
    with at most N active in each group: these choices are the independent sets of a laminar matroid, for
    which taking the largest first is optimal (Edmonds 1971).
    """
    return ~mask & _leading(scores, ~mask, cap, mask)


def room(mask: Tensor, cap: Cap) -> Tensor:
    """How many positions may be grown under the cap: int64, shape (). A group over it has no room."""
    n_active = grouped(mask, cap.axis, cap.pattern).sum(1)
    return (cap.pattern.n - n_active).clamp(min=0).sum()


def capacity(shape: tuple[int, ...], cap: Cap) -> int:
    """Most active weights of a layer under the cap."""
    n_weights = 1
    for size in shape:
        n_weights *= size
    return n_weights // cap.pattern.m * cap.pattern.n


def _leading(values: Tensor, eligible: Tensor, cap: Cap, active: Tensor | None) -> Tensor:
    """Mark the first of each group's eligible members by |value|: N of them, less one for each active
    member.
    """
    # NaN leads, so that it is seen by whoever chooses among the leading, and not lost by a comparison here.
    groups = grouped(values.abs().nan_to_num_(nan=torch.inf, posinf=torch.inf), cap.axis, cap.pattern)
    among = grouped(eligible, cap.axis, cap.pattern)
    n_places: int | Tensor = cap.pattern.n
    if active is not None:
        n_places = cap.pattern.n - grouped(active, cap.axis, cap.pattern).sum(1, dtype=torch.int16)
    if cap.pattern.m <= _COMPARED:
        chosen = _by_comparison(groups, among, n_places)
    else:
        chosen = _by_sorting(groups, among, n_places)
    return ungrouped(chosen, tuple(values.shape), cap.axis)


def _by_comparison(magnitudes_GM: Tensor, eligible_GM: Tensor, n_places: int | Tensor) -> Tensor:
    """Rank by counting, for each member, those that come before it.

    Member-major, so that each step is one stream.
    """
    size = magnitudes_GM.shape[1]
    magnitude = torch.where(eligible_GM, magnitudes_GM, -1).T.contiguous()
    places = [
        torch.zeros(magnitude.shape[1], dtype=torch.int8, device=magnitudes_GM.device) for _ in range(size)
    ]
    for first in range(size):
        for second in range(first + 1, size):
            later = magnitude[second] > magnitude[first]
            places[first] += later
            places[second] += ~later
    return torch.stack([place < n_places for place in places], dim=1) & eligible_GM


def _by_sorting(magnitudes_GM: Tensor, eligible_GM: Tensor, n_places: int | Tensor) -> Tensor:
    order = torch.where(eligible_GM, magnitudes_GM, -1).argsort(dim=1, descending=True, stable=True)
    place = torch.arange(magnitudes_GM.shape[1], device=magnitudes_GM.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, place)
    limit = n_places if isinstance(n_places, int) else n_places.unsqueeze(1)
    return (rank < limit) & eligible_GM
