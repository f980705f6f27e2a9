"""What a pattern costs in the best case, and the order that costs least."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_export.sparsity.lossless import cut_share, least_cut_share, least_cutting_order
from sparse_export.sparsity.pattern import NMPattern, groups_over, largest_per_group, obeys

TWO_FOUR = NMPattern(n=2, m=4)
PATTERNS = st.sampled_from([TWO_FOUR, NMPattern(n=1, m=2), NMPattern(n=1, m=4), NMPattern(n=3, m=4)])


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, NMPattern]:
    """Sparse or dense (O, I), with columns of zeros among them."""
    pattern = draw(PATTERNS)
    n_rows, n_groups = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (n_rows, n_groups * pattern.m)
    weight = torch.randn(shape, generator=generator)
    weight *= torch.rand(shape, generator=generator) < draw(st.floats(0, 1))
    return weight * (torch.rand(shape[1], generator=generator) < draw(st.floats(0, 1))), pattern


@given(weights())
def test_the_cut_is_none_exactly_when_the_pattern_is_obeyed(case: tuple[Tensor, NMPattern]) -> None:
    weight, pattern = case
    share = cut_share(weight, 1, pattern)
    assert (share == 0) == obeys(weight, 1, pattern)
    kept = float((weight.double().abs() * largest_per_group(weight, 1, pattern)).sum())
    total = float(weight.double().abs().sum())
    assert share * total == pytest.approx(total - kept, abs=1e-9)


@settings(deadline=None, max_examples=10)
@given(weights())
def test_no_order_cuts_less_than_the_bound(case: tuple[Tensor, NMPattern]) -> None:
    weight, pattern = case
    bound = least_cut_share(weight, 1, pattern)
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(7))
    for found in (order, least_cutting_order(weight, pattern, cutting=True)):
        assert bound <= cut_share(weight[:, found], 1, pattern) + 1e-12
    n_room = weight.shape[1] * pattern.n // pattern.m
    assert (bound > 0) == bool(((weight != 0).sum(1) > n_room).any())


def test_the_bound_of_one_row_is_reached_by_some_order() -> None:
    weight, pattern = torch.tensor([[9.0, 8.0, 7.0, 6.0, 5.0, 0.0]]), NMPattern(n=1, m=2)
    bound = least_cut_share(weight, 1, pattern)
    assert bound == pytest.approx((6 + 5) / 35)
    orders = torch.tensor(list(itertools.permutations(range(6))))
    assert min(cut_share(weight[:, order], 1, pattern) for order in orders) == pytest.approx(bound)


def test_the_axis_and_kernel_positions_are_told_apart() -> None:
    weight = torch.zeros(2, 8, 3)
    weight[0, :4, 1] = 1
    assert cut_share(weight, 1, TWO_FOUR) == pytest.approx(0.5)
    assert least_cut_share(weight, 1, TWO_FOUR) == 0  # four of eight in a row: another order has room
    assert least_cut_share(weight[:, :4], 1, TWO_FOUR) == pytest.approx(0.5)


def test_a_weight_of_zeros_costs_nothing() -> None:
    assert cut_share(torch.zeros(2, 8), 1, TWO_FOUR) == least_cut_share(torch.zeros(2, 8), 1, TWO_FOUR) == 0


@settings(deadline=None, max_examples=10)
@given(weights(), st.booleans(), st.booleans())
def test_the_order_is_a_permutation_that_is_never_worse(
    case: tuple[Tensor, NMPattern], cutting: bool, live_first: bool
) -> None:
    weight, pattern = case
    order = least_cutting_order(weight, pattern, cutting=cutting, live_first=live_first)
    assert torch.equal(order.sort().values, torch.arange(weight.shape[1]))
    again = least_cutting_order(weight, pattern, cutting=cutting, live_first=live_first)
    assert torch.equal(order, again)
    if cutting:
        assert cut_share(weight[:, order], 1, pattern) <= cut_share(weight, 1, pattern) + 1e-12
    else:
        assert int(groups_over(weight[:, order], 1, pattern)) <= int(groups_over(weight, 1, pattern))


def test_dead_columns_come_last_in_whole_groups() -> None:
    torch.manual_seed(3)
    weight = torch.randn(16, 64) * (torch.rand(16, 64) < 0.12)
    weight[:, torch.randperm(64)[:30]] = 0
    n_live = int((weight != 0).any(0).sum())
    plain = weight[:, least_cutting_order(weight, TWO_FOUR)]
    ordered = weight[:, least_cutting_order(weight, TWO_FOUR, live_first=True)]
    assert obeys(plain, 1, TWO_FOUR)
    assert obeys(ordered, 1, TWO_FOUR)
    n_left = -(-n_live // 4) * 4
    assert not ordered[:, n_left:].any()
    assert plain[:, n_left:].any()  # else there would be nothing to show


def test_room_in_dead_columns_goes_before_having_them_last() -> None:
    weight = torch.zeros(4, 8)
    weight[:, :4] = 1  # only spread over both groups do they fit
    order = least_cutting_order(weight, TWO_FOUR, live_first=True)
    assert obeys(weight[:, order], 1, TWO_FOUR)


def test_values_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        least_cutting_order(torch.full((4, 8), float("nan")), TWO_FOUR)
    with pytest.raises(ValueError, match="multiple of 4"):
        cut_share(torch.ones(2, 6), 1, TWO_FOUR)
