"""What a pattern costs a weight that was trained without it, and the order of columns in which it costs
nothing.

Legend: O rows, I columns (input channels), R stacked rows, M members of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_export.sparsity.pattern import NMPattern, groups_over, largest_per_group
from sparse_export.sparsity.permute import find_permutation

_MORE_SEEDS = 2  # searches after the first one, where few groups are left over
_FEW_OVER = 0.01  # of all groups
_ROUNDS_TO_CUT = 600  # four times the search's own number: 2 to 10 % less is cut, where a round is cheap
_CHEAP = 1 << 20  # entries


def cut_share(weight: Tensor, axis: int, pattern: NMPattern) -> float:
    """Share of sum |w| that lies outside the N largest of each group; 0 exactly when no group is over.

    Raises ValueError when M does not divide the axis.
    """
    if not int(groups_over(weight, axis, pattern)):
        return 0.0
    magnitudes = weight.detach().abs().double()
    lost = magnitudes.masked_fill(largest_per_group(magnitudes, axis, pattern), 0)
    return float(lost.sum() / magnitudes.sum())


def least_cut_share(weight: Tensor, axis: int, pattern: NMPattern) -> float:
    """What `cut_share` is at least, in whatever order the columns are: 0 when each row has room for its
    nonzeros.

    A row of I weights has I / M groups, so at most I * N / M of them stay: at best the largest.
    """
    rows_RI = weight.detach().movedim(axis, -1).reshape(-1, weight.shape[axis]).abs().double()
    n_cut = rows_RI.shape[1] - rows_RI.shape[1] // pattern.m * pattern.n
    smallest = rows_RI.topk(n_cut, dim=1, largest=False).values
    total = float(rows_RI.sum())
    return float(smallest.sum()) / total if total else 0.0


def least_cutting_order(
    weight_RI: Tensor, pattern: NMPattern, *, cutting: bool = False, live_first: bool = False, seed: int = 0
) -> Tensor:
    """An order of columns in which no group is over the cap, where the search finds one.

    cutting: when some stay over, take the order that cuts the smaller share of sum |w| instead of the one
    with fewer groups over.  live_first: prefer an order in which columns of nothing but zeros come last, in
    groups of their own, so that they can be taken out; an order that leaves no group over goes before that.
    Returns int64 (I,), on the CPU. The same arguments give the same order.  Raises ValueError as
    `find_permutation` does.
    """
    weight_RI = weight_RI.detach().cpu()
    if live_first:
        order = _live_first(weight_RI, pattern, seed)
        if order is not None:
            return order
    best = find_permutation(weight_RI, pattern, seed=seed, objective="groups")
    fewest = int(groups_over(weight_RI[:, best], 1, pattern))
    n_groups = weight_RI.numel() // pattern.m
    for n in range(1, _MORE_SEEDS + 1):
        if not 0 < fewest <= _FEW_OVER * n_groups:
            break
        other = find_permutation(weight_RI, pattern, seed=seed + n, objective="groups")
        n_over = int(groups_over(weight_RI[:, other], 1, pattern))
        if n_over < fewest:
            best, fewest = other, n_over
    if fewest and cutting:
        rounds = _ROUNDS_TO_CUT if weight_RI.numel() <= _CHEAP else None
        other = find_permutation(weight_RI, pattern, seed=seed, rounds=rounds, objective="magnitude")
        best = min((best, other), key=lambda order: cut_share(weight_RI[:, order], 1, pattern))
    return best


def _live_first(weight_RI: Tensor, pattern: NMPattern, seed: int) -> Tensor | None:
    """An order without groups over that has the columns without a nonzero last; None where none was found."""
    live = (weight_RI != 0).any(0)
    ranked = (~live).to(torch.uint8).argsort(stable=True)
    n_first = -(-int(live.sum()) // pattern.m) * pattern.m
    if not 0 < n_first < len(ranked):
        return None
    first = ranked[:n_first]
    first = first[find_permutation(weight_RI[:, first], pattern, seed=seed, objective="groups")]
    if int(groups_over(weight_RI[:, first], 1, pattern)):
        return None
    return torch.cat([first, ranked[n_first:]])
