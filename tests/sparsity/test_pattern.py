"""N:M patterns: grouping along the reduction axis, counting, choosing."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_export.errors import UsageError
from sparse_export.sparsity.pattern import (
    NMPattern,
    grouped,
    groups_over,
    largest_per_group,
    obeys,
    pattern_from_text,
    ungrouped,
)

TWO_FOUR = NMPattern(n=2, m=4)


@st.composite
def _cases(draw: st.DrawFn) -> tuple[torch.Tensor, int, NMPattern]:
    m = draw(st.integers(2, 6))
    pattern = NMPattern(n=draw(st.integers(1, m - 1)), m=m)
    rank = draw(st.integers(1, 4))
    axis = draw(st.integers(0, rank - 1))
    shape = [draw(st.integers(1, 3)) for _ in range(rank)]
    shape[axis] *= m
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    # Few values, so that there are ties and zeros.
    return torch.randint(-3, 4, shape, generator=generator).float(), axis, pattern


@given(_cases())
def test_grouping_and_back_is_the_identity(case: tuple[torch.Tensor, int, NMPattern]) -> None:
    tensor, axis, pattern = case
    groups = grouped(tensor, axis, pattern)
    assert groups.shape == (tensor.numel() // pattern.m, pattern.m)
    assert torch.equal(ungrouped(groups, tuple(tensor.shape), axis), tensor)


@given(_cases())
def test_groups_are_consecutive_entries_along_the_axis(case: tuple[torch.Tensor, int, NMPattern]) -> None:
    tensor, axis, pattern = case
    rows = tensor.movedim(axis, -1)
    expected = [
        rows[place][start : start + pattern.m].tolist()
        for place in itertools.product(*map(range, rows.shape[:-1]))
        for start in range(0, rows.shape[-1], pattern.m)
    ]
    assert grouped(tensor, axis, pattern).tolist() == expected


@given(_cases())
def test_groups_over_the_cap_are_counted_as_a_loop_counts_them(
    case: tuple[torch.Tensor, int, NMPattern],
) -> None:
    tensor, axis, pattern = case
    over = sum(
        sum(value != 0 for value in group) > pattern.n for group in grouped(tensor, axis, pattern).tolist()
    )
    assert int(groups_over(tensor, axis, pattern)) == over
    assert int(groups_over(tensor != 0, axis, pattern)) == over
    assert obeys(tensor, axis, pattern) == (over == 0)


@given(_cases())
def test_the_chosen_of_a_group_are_its_largest_and_ties_go_to_the_lower_index(
    case: tuple[torch.Tensor, int, NMPattern],
) -> None:
    tensor, axis, pattern = case
    chosen = largest_per_group(tensor, axis, pattern)
    assert obeys(chosen, axis, pattern)
    for values, marks in zip(
        grouped(tensor, axis, pattern).tolist(), grouped(chosen, axis, pattern).tolist(), strict=True
    ):
        best = sorted(range(pattern.m), key=lambda i: (-abs(values[i]), i))[: pattern.n]
        assert [i for i, mark in enumerate(marks) if mark] == sorted(best)


def test_not_a_number_counts_as_a_nonzero() -> None:
    weight = torch.tensor([[float("nan"), 1.0, 2.0, 0.0]])
    assert int(groups_over(weight, 1, TWO_FOUR)) == 1


@pytest.mark.parametrize("text", ["2:4", "1:2", "4:8", "3:4"])
def test_a_pattern_is_read_and_written_alike(text: str) -> None:
    assert str(pattern_from_text(text)) == text


@pytest.mark.parametrize(
    "text", ["", "2", "2:", ":4", "4:4", "0:4", "5:4", "-2:4", "2:4:8", "2/4", "2:4 ", "٢:٤"]
)
def test_what_is_no_pattern_is_refused_with_the_text(text: str) -> None:
    with pytest.raises(UsageError, match=r"N:M"):
        pattern_from_text(text)


def test_an_axis_that_m_does_not_divide_is_refused_with_its_size() -> None:
    with pytest.raises(ValueError, match="30 entries; 2:4 needs a multiple of 4"):
        grouped(torch.ones(3, 30), 1, TWO_FOUR)
