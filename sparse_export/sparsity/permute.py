"""Orders of input channels under which an N:M pattern cuts least.

Legend: O rows of the weight, I its columns (input channels), G = I / M groups, R rows that the order matters
to, K columns that change places.

One round takes one column, of a random slot, out of every group and puts all of them back by the best
assignment. What a column c adds to a group of M - 1 others is, summed over rows, relu(|c| - t), t the N-th
largest of the others. So a G x G matrix of sums over rows holds all that a round can do, and scipy's
assignment is optimal for it. Such a round never makes the order worse. To leave local optima, noise is added
to the matrix that fades out before the end (annealing).

All sums are whole numbers below 2^24 kept in float32, hence exact: neither the number of threads nor the
processor's vector width changes the answer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparse_export.sparsity.pattern import NMPattern, fits

Objective = Literal["magnitude", "groups"]

DEFAULT_ROUNDS: dict[Objective, int] = {"magnitude": 150, "groups": 600}

# Groups that trade columns with one another in a round. The matrix costs R x G x block and the assignment
# about G x block^2, so a bound keeps wide layers affordable; which groups form a block is drawn anew in every
# round.
_BLOCK = 256
# Numbers in the buffer that is reduced at once: 4 MB stay in the caches.
_BUFFER = 1 << 20
_EXACT = 1 << 24  # float32 holds all whole numbers up to here

# Of a search, this share of the rounds at the beginning, and as much at the end, is without noise.
_COLD = 0.1
# Fewer rounds than these converge too little for noise to pay.
_FEWEST_ROUNDS_WITH_NOISE = 100
_NOISE = 0.3  # standard deviation at the start, in units of `_frustration`

# So few groups are searched from many starts. One draw of slots looks at few of the exchanges that there are.
_FEW_GROUPS = 4
_ROUNDS_A_START = 5
_DRAWS_A_ROUND = 10

Costs = Callable[[Tensor, Tensor], NDArray[np.float64]]
"""(removed columns (G,), what stays of each group (G, M - 1)) → what it costs to put column k into group g,
(K, G).
"""

Score = Callable[[Tensor, Tensor, NMPattern], tuple[float, ...]]
"""(columns (I, R), an order of them, the pattern) → what the objective wants small, the first first."""


def find_permutation(
    weight_OI: Tensor,
    pattern: NMPattern,
    *,
    seed: int = 0,
    rounds: int | None = None,
    objective: Objective = "magnitude",
) -> Tensor:
    """An order of the columns such that `weight_OI[:, order]` loses little to N:M groups of consecutive
    columns.

    weight_OI: float, (O, I), finite. Layers that read the same channels are stacked on rows; a convolution
    comes with a row for each output and kernel position.  objective: `magnitude` keeps as much sum |w| as it
    can; `groups` first has as few groups with more than N nonzeros as it can, then as much sum |w|. Zero such
    groups means that nothing is cut.  rounds: effort; None is 150 for `magnitude`, 600 for `groups`. A search
    ends early when nothing is cut. Returns int64, (I,), on the weight's device: the identity, unless
    something better by the objective was found. The same arguments give the same order. Raises ValueError
    when M does not divide I, for values that are not finite or no floats, for a negative seed or number of
    rounds, and for an unknown objective.
    """
    _check(weight_OI, pattern, seed, rounds, objective)
    n_columns = weight_OI.shape[1]
    identity = torch.arange(n_columns)
    weight = weight_OI.detach().abs().cpu()
    if weight.dtype != torch.float64:
        weight = weight.float()
    # A row with at most N nonzeros loses nothing in any order.
    columns_IR = weight[(weight != 0).sum(1) > pattern.n].T.contiguous()
    if not columns_IR.shape[1] or n_columns == pattern.m:
        return identity.to(weight_OI.device)
    score = _SCORES[objective]
    before = score(columns_IR, identity, pattern)
    if before[-1] == 0:
        return identity.to(weight_OI.device)
    n_rounds = DEFAULT_ROUNDS[objective] if rounds is None else rounds
    rng = np.random.default_rng(seed)
    with _one_thread():
        groups = _SEARCHES[objective](columns_IR, identity.view(-1, pattern.m), pattern, n_rounds, rng)
    # Columns of a group in rising order, groups by their first: like the identity where nothing was moved.
    groups = groups.sort(dim=1).values
    found = groups[groups[:, 0].argsort()].flatten()
    better = score(columns_IR, found, pattern) < before
    return (found if better else identity).to(weight_OI.device)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Torch with one thread inside.

    A search calls small operations by the ten thousand. With two threads on two processors that had other
    work too, each waited for its slower thread: 128 s for 800 rounds at 512 columns in place of 6.6 (AMD
    EPYC, 2026-11-25).
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def _check(
    weight_OI: Tensor, pattern: NMPattern, seed: int, rounds: int | None, objective: Objective
) -> None:
    if weight_OI.ndim != 2 or not weight_OI.is_floating_point():
        raise ValueError(
            f"The weight is {weight_OI.dtype} of shape {tuple(weight_OI.shape)}; floats of shape (O, I) were "
            "expected."
        )
    if not fits(tuple(weight_OI.shape), 1, pattern):
        raise ValueError(
            f"The weight has {weight_OI.shape[1]} input columns; {pattern} needs a multiple of {pattern.m}."
        )
    if not bool(torch.isfinite(weight_OI).all()):
        raise ValueError("The weight holds NaN or infinity; a channel order needs finite values.")
    if objective not in get_args(Objective):
        raise ValueError(
            f"There is no objective {objective!r}; one of {', '.join(get_args(Objective))} was expected."
        )
    for name, value in (("seed", seed), ("rounds", rounds)):
        if value is not None and value < 0:
            raise ValueError(f"{name} is {value}; at least 0 was expected.")


def _least_cut(
    columns_IR: Tensor, groups: Tensor, pattern: NMPattern, n_rounds: int, rng: np.random.Generator
) -> Tensor:
    """Groups (G, M) whose N:M cut of |w| is small."""
    nonzero_IR = columns_IR != 0
    found = groups
    costs = _cut_costs(_whole_numbers(columns_IR, pattern), pattern)
    if len(groups) <= _FEW_GROUPS:
        return _best_of_starts(columns_IR, groups, costs, _cut, pattern, n_rounds, rng)
    for n, found in enumerate(_annealed(groups, costs, n_rounds, rng)):
        if n % 5 == 0 and _n_over(nonzero_IR, found, pattern) == 0:
            break
    return found


def _fewest_over(
    columns_IR: Tensor, groups: Tensor, pattern: NMPattern, n_rounds: int, rng: np.random.Generator
) -> Tensor:
    """Groups (G, M) of which few have more than N nonzeros; among equally few, a small cut.

    Most of the rounds lower a smooth stand-in, the number of nonzeros in excess: products of matrices, and
    cheap. A last quarter, from the best so far, lowers the objective itself.
    """
    if len(groups) <= _FEW_GROUPS:
        costs = _over_then_cut_costs(columns_IR, pattern)
        return _best_of_starts(columns_IR, groups, costs, _groups_and_cut, pattern, -(-n_rounds // 4), rng)
    nonzero_IR = columns_IR != 0
    best, fewest = groups, _n_over(nonzero_IR, groups, pattern)
    n_last = n_rounds // 4
    costs = _excess_costs(nonzero_IR.float(), pattern)
    for found in _annealed(groups, costs, n_rounds - n_last, rng):
        n_over = _n_over(nonzero_IR, found, pattern)
        if n_over < fewest:
            best, fewest = found, n_over
            if fewest == 0:
                return best
    costs = _over_then_cut_costs(columns_IR, pattern)
    for _ in range(n_last):
        best, _ = _round(best, costs, 0.0, rng)
        if _n_over(nonzero_IR, best, pattern) == 0:
            break
    return best


def _best_of_starts(
    columns_IR: Tensor,
    groups: Tensor,
    costs: Costs,
    score: Score,
    pattern: NMPattern,
    n_rounds: int,
    rng: np.random.Generator,
) -> Tensor:
    """The best groups (G, M) of many short searches: the first from `groups`, the others from random ones.

    Of few groups the costs are few numbers, which tell noise nothing, and one search is cheap.
    """
    best, lowest = groups, score(columns_IR, groups.flatten(), pattern)
    for n in range(n_rounds):
        if n and n % _ROUNDS_A_START == 0:
            groups = torch.from_numpy(rng.permutation(len(columns_IR))).view_as(groups)
        for _ in range(_DRAWS_A_ROUND):
            groups, _ = _round(groups, costs, 0.0, rng)
        reached = score(columns_IR, groups.flatten(), pattern)
        if reached < lowest:
            best, lowest = groups, reached
            if lowest[-1] == 0:
                break
    return best


def _annealed(groups: Tensor, costs: Costs, n_rounds: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """The groups after each round, noise falling along a line to 0 between two spans without any."""
    n_cold = math.ceil(_COLD * n_rounds) if n_rounds >= _FEWEST_ROUNDS_WITH_NOISE else n_rounds
    scale = 0.0
    for n in range(n_rounds):
        share = max(0.0, 1 - (n - n_cold) / (n_rounds - 2 * n_cold)) if n >= n_cold else 0.0
        groups, costs_KG = _round(groups, costs, scale * share, rng)
        yield groups
        if (n + 1 - n_cold) % 20 == 0:
            scale = _NOISE * _frustration(costs_KG, rng)


def _round(
    groups: Tensor, costs: Costs, noise: float, rng: np.random.Generator
) -> tuple[Tensor, NDArray[np.float64]]:
    """One column out of every group, and all back where they cost least.

    noise: standard deviation of what is added to the costs.
    Returns new groups (G, M), and the costs, without noise, among the groups that traded last.
    """
    from scipy.optimize import linear_sum_assignment  # 0.3 s that the rest of the package need not wait

    n_groups, m = groups.shape
    slots = torch.from_numpy(rng.integers(0, m, n_groups))[:, None]
    removed = groups.gather(1, slots)
    groups = groups.scatter(1, slots, groups[:, :1])
    drawn = torch.from_numpy(rng.permutation(n_groups)) if n_groups > _BLOCK else torch.arange(n_groups)
    for block in drawn.tensor_split(math.ceil(n_groups / _BLOCK)):
        out = removed[block, 0]
        costs_KG = costs(out, groups[block, 1:])
        if noise:
            spread = rng.standard_normal(costs_KG.shape, np.float32)
            takes, places = linear_sum_assignment(costs_KG + noise * spread)
        else:
            takes, places = linear_sum_assignment(costs_KG)
        groups[block[torch.from_numpy(places)], 0] = out[torch.from_numpy(takes)]
    return groups, costs_KG


def _frustration(costs_KG: NDArray[np.float64], rng: np.random.Generator) -> float:
    """The standard deviation of the costs without what a sum and few products of a column's and a group's
    factor tell.

    Heavy columns next to light ones spread the costs by factors of tens. That part is no trap for the search,
    and noise of its size would drown the rest.
    """
    rest = costs_KG - costs_KG.mean(0) - costs_KG.mean(1, keepdims=True) + costs_KG.mean()
    n_products = min(4, len(rest) // 16)
    if n_products:
        basis = rest @ (rest.T @ (rest @ rng.standard_normal((len(rest), 2 * n_products))))
        basis = np.linalg.qr(basis)[0]
        values = np.linalg.svd(basis.T @ rest, compute_uv=False)[:n_products]
        return math.sqrt(max(0.0, float((rest**2).sum() - (values**2).sum())) / rest.size)
    return float(rest.std())


def _cut_costs(whole_IR: Tensor, pattern: NMPattern) -> Costs:
    """Costs: minus what a column adds to the sum that its group keeps."""

    def costs(out: Tensor, stay: Tensor) -> NDArray[np.float64]:
        bar_GR = _nth_largest([whole_IR[slot] for slot in stay.T], pattern.n)
        # sum relu(a - b) = sum max(a, b) - sum b: one pass less over the buffer than with the difference.
        return (bar_GR.sum(1) - _sums_of_larger(whole_IR[out], bar_GR)).double().numpy()

    return costs


def _excess_costs(nonzero_IR: Tensor, pattern: NMPattern) -> Costs:
    """Costs: 10 for a nonzero that finds N others in its row of the group, 20 for more than N, 1 for N - 1.

    nonzero_IR: 0.0 and 1.0. The 1 leaves room for later rounds; the 20 spreads what cannot be avoided.
    """

    n = pattern.n

    def costs(out: Tensor, stay: Tensor) -> NDArray[np.float64]:
        count_GR = nonzero_IR[stay].sum(1)
        price_GR = 10 * (count_GR >= n).float() + 10 * (count_GR > n) + (count_GR == n - 1)
        return (nonzero_IR[out] @ price_GR.T).double().numpy()

    return costs


def _over_then_cut_costs(columns_IR: Tensor, pattern: NMPattern) -> Costs:
    """Costs: rows in which a column brings its group over N nonzeros, ties decided by what is cut."""
    whole_IR = _whole_numbers(columns_IR, pattern)
    nonzero_IR = (columns_IR != 0).float()
    cut_costs = _cut_costs(whole_IR, pattern)
    above_any_cut = float(whole_IR.sum(dtype=torch.float64)) + 1

    def costs(out: Tensor, stay: Tensor) -> NDArray[np.float64]:
        full_GR = (nonzero_IR[stay].sum(1) == pattern.n).float()
        over_KG = (nonzero_IR[out] @ full_GR.T).double().numpy()
        return over_KG * above_any_cut + cut_costs(out, stay)

    return costs


def _whole_numbers(columns_IR: Tensor, pattern: NMPattern) -> Tensor:
    """|w| as whole numbers in float32, so small that no sum of the search passes 2^24; what is not 0 is at
    least 1.

    The middle column is given a mean of 64 or more. Where few columns are so heavy that this leaves no room
    for them, their entries are clipped: that they are heavy is all a search needs to know.
    """
    sums = columns_IR.sum(1, dtype=torch.float64)
    n_rows = columns_IR.shape[1]
    # The N-th largest of M - 1 columns sums to (M - 1) / N of the heaviest at most; one more column meets it.
    largest = _EXACT * pattern.n // (pattern.n + pattern.m - 1)
    middle = float(sums[sums > 0].median())
    scale = max(largest / float(sums.max()), min(64 * n_rows, largest) / middle)
    whole_IR = (columns_IR.double() * scale).floor().clamp_(min=1).mul_(columns_IR != 0)
    heavy = whole_IR.sum(1) > largest
    whole_IR[heavy] = whole_IR[heavy].clamp(max=max(1, largest // n_rows))
    return whole_IR.float()


def _nth_largest(columns: list[Tensor], n: int) -> Tensor:
    """Entry by entry, the n-th largest of the tensors, all of one shape; n from 1 to their number."""
    smallest = len(columns) - n + 1
    if min(n, smallest) > 8:
        return torch.stack(columns).kthvalue(smallest, dim=0).values
    # Insertion into a short list: few passes over contiguous memory, where sorting is slow for a handful
    # each.
    keep, pass_on = (torch.maximum, torch.minimum) if n <= smallest else (torch.minimum, torch.maximum)
    ranks: list[Tensor] = []
    for column in columns:
        loser = column
        for place, held in enumerate(ranks):
            ranks[place], loser = keep(held, loser), pass_on(held, loser)
        if len(ranks) < min(n, smallest):
            ranks.append(loser)
    return ranks[-1]


def _sums_of_larger(left_KR: Tensor, right_GR: Tensor) -> Tensor:
    """Of every pair of rows, the sum of the larger entries: float32, (K, G)."""
    sums_KG = torch.empty(len(left_KR), len(right_GR))
    start = 0
    for part in right_GR.split(max(1, _BUFFER // right_GR.shape[1])):
        buffer, out = torch.empty_like(part), sums_KG[:, start : start + len(part)]
        for row, sums in zip(left_KR, out, strict=True):
            torch.maximum(row, part, out=buffer)
            torch.sum(buffer, 1, out=sums)
        start += len(part)
    return sums_KG


def _n_over(nonzero_IR: Tensor, groups: Tensor, pattern: NMPattern) -> int:
    """How many groups of how many rows, in all, have more than N nonzeros."""
    count_GR = torch.zeros(len(groups), nonzero_IR.shape[1], dtype=torch.int32)
    for slot in groups.T:
        count_GR += nonzero_IR[slot]
    return int((count_GR > pattern.n).sum())


def _cut(columns_IR: Tensor, order: Tensor, pattern: NMPattern) -> tuple[float, ...]:
    """The sum of |w| that N:M groups of this order lose, in float64."""
    grouped_GMR = columns_IR[order].double().view(-1, pattern.m, columns_IR.shape[1]).numpy()
    lost = np.sort(grouped_GMR, axis=1)[:, : pattern.m - pattern.n]
    return (math.fsum(lost.sum((1, 2)).tolist()),)


def _groups_and_cut(columns_IR: Tensor, order: Tensor, pattern: NMPattern) -> tuple[float, ...]:
    """The number of groups over the cap in this order, and `_cut`."""
    return _n_over(columns_IR != 0, order.view(-1, pattern.m), pattern), *_cut(columns_IR, order, pattern)


_SEARCHES = {"magnitude": _least_cut, "groups": _fewest_over}
_SCORES: dict[Objective, Score] = {"magnitude": _cut, "groups": _groups_and_cut}
