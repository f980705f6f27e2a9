"""The exact selection of the k largest, in both forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sparse_export.sparsity import select
from sparse_export.sparsity.select import (
    largest,
    largest_in_each,
    largest_on_cpu,
    largest_on_device,
    largest_together,
)
from tests.sparsity import oracle

SPECIAL = {
    torch.float32: (0.0, -0.0, 1.0, -1.0, 1.5, math.inf, -math.inf, 2.0**-149, -(2.0**-149), 2.0**-127, 3e38),
    torch.float64: (0.0, -0.0, 1.0, -1.0, 1.5, math.inf, -math.inf, 5e-324, -5e-324, 2.0**-1030, 1e308),
}

Case = tuple[torch.dtype, list[float], list[bool], int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A dtype, values, candidates, and a count that the candidates suffice for."""
    dtype = draw(st.sampled_from((torch.float32, torch.float64)))
    any_value = st.floats(allow_nan=False, width=32 if dtype == torch.float32 else 64)
    values = draw(st.lists(st.sampled_from(SPECIAL[dtype]) | any_value, min_size=1, max_size=30))
    candidates = draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    return dtype, values, candidates, draw(st.integers(0, sum(candidates)))


def neighbours(dtype: torch.dtype) -> Case:
    """Values that differ in one bit each, one for every bit below the sign."""
    integer = torch.int32 if dtype == torch.float32 else torch.int64
    n_bits = 31 if dtype == torch.float32 else 63
    bits = torch.tensor([1 << n for n in range(n_bits)], dtype=integer)
    values: list[float] = bits.view(dtype).tolist()
    return dtype, values, [True] * len(values), len(values) // 2


@given(cases())
@example(neighbours(torch.float32))
@example(neighbours(torch.float64))
def test_both_forms_equal_the_sorted_order(case: Case) -> None:
    dtype, values, candidates, count = case
    tensor, mask = torch.tensor(values, dtype=dtype), torch.tensor(candidates)
    expected = oracle.largest(values, candidates, count)
    assert largest_on_cpu(tensor, mask, count).tolist() == expected
    assert largest_on_device(tensor, mask, torch.tensor(count)).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n_levels", [2, 50, 10_000_000])
def test_both_forms_agree_on_a_larger_tensor(dtype: torch.dtype, n_levels: int) -> None:
    generator = torch.Generator().manual_seed(n_levels)
    values = (torch.randint(-n_levels, n_levels, (300, 70), generator=generator) / n_levels).to(dtype)
    candidates = torch.rand(values.shape, generator=generator) < 0.7
    for count in (0, 1, 777, int(candidates.sum()) - 1, int(candidates.sum())):
        chosen = largest_on_cpu(values, candidates, count)
        assert int(chosen.sum()) == count
        assert torch.equal(chosen, largest_on_device(values, candidates, torch.tensor(count)))


@given(st.lists(cases(), min_size=1, max_size=5))
def test_layers_together_give_what_each_gives_alone(several: list[Case]) -> None:
    wide = several[0][0]  # one width for all: values are cast
    values = [torch.tensor(values, dtype=wide) for _, values, _, _ in several]
    candidates = [torch.tensor(some) for _, _, some, _ in several]
    counts = [count for *_, count in several]
    found = largest_together(values, candidates, torch.tensor(counts))
    for chosen, value, some, count in zip(found, values, candidates, counts, strict=True):
        assert torch.equal(chosen, largest_on_cpu(value, some, count))


@pytest.mark.parametrize(("most", "most_layers"), [(1, 99), (40, 99), (10**9, 99), (10**9, 2)])
def test_layers_of_any_size_and_type_are_selected_from_in_groups(
    most: int, most_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "_MOST_AT_ONCE", most)
    monkeypatch.setattr(select, "_MOST_LAYERS", most_layers)
    generator = torch.Generator().manual_seed(most)
    types = (torch.float32, torch.float16, torch.float64, torch.float64, torch.float32, torch.bfloat16)
    shapes = ((3, 5), (), (4, 2, 2), (64,), (1,), (6, 6))
    values = {
        str(place): (torch.randint(-9, 9, shape, generator=generator) / 8).to(dtype)
        for place, (shape, dtype) in enumerate(zip(shapes, types, strict=True))
    }
    candidates = {name: torch.rand(value.shape, generator=generator) < 0.7 for name, value in values.items()}
    counts = torch.stack([some.sum() // 2 for some in candidates.values()])
    wanted = largest_in_each(values, candidates, counts)
    groups = list(select._groups(list(values.values())))
    assert [place for group in groups for place in group] == list(range(6))
    for group in groups:
        assert len({values[str(place)].dtype == torch.float64 for place in group}) == 1
        assert len(group) <= most_layers
        assert len(group) == 1 or sum(values[str(place)].numel() for place in group) <= most
    for group in groups:
        names = [str(place) for place in group]
        found = largest_together(
            [values[name] for name in names],
            [candidates[name] for name in names],
            counts[group[0] : group[-1] + 1],
        )
        for name, chosen in zip(names, found, strict=True):
            assert torch.equal(chosen, wanted[name]), name
    values_there, candidates_there = (
        {name: one.to("meta") for name, one in some.items()} for some in (values, candidates)
    )
    assert {
        name: chosen.shape
        for name, chosen in largest_in_each(values_there, candidates_there, counts.to("meta")).items()
    } == {name: value.shape for name, value in values.items()}


@pytest.mark.parametrize("form", ["cpu", "device"])
def test_strided_input_is_read_in_index_order(form: str) -> None:
    values, candidates = torch.ones(3, 4).t(), torch.ones(3, 4, dtype=torch.bool).t()
    if form == "cpu":
        chosen = largest_on_cpu(values, candidates, 5)
    else:
        chosen = largest_on_device(values, candidates, torch.tensor(5))
    assert chosen.flatten().tolist() == [True] * 5 + [False] * 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_float_dtype_is_taken(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, -3.0, 2.0, 0.0], dtype=dtype)
    assert largest(values, torch.ones(4, dtype=torch.bool), torch.tensor(2)).tolist() == [
        False,
        True,
        True,
        False,
    ]


def test_a_parameter_that_requires_grad_is_taken() -> None:
    values = torch.nn.Parameter(torch.tensor([1.0, -3.0, 2.0]))
    candidates = torch.ones(3, dtype=torch.bool)
    assert largest(values, candidates, torch.tensor(1)).tolist() == [False, True, False]
    assert largest_on_device(values, candidates, torch.tensor(1)).tolist() == [False, True, False]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_candidate_that_is_nan_raises_on_the_cpu(count: int) -> None:
    values = torch.tensor([1.0, math.nan, 2.0])
    with pytest.raises(ValueError, match="hold NaN"):
        largest_on_cpu(values, torch.ones(3, dtype=torch.bool), count)


def test_nan_beside_the_candidates_does_not_matter() -> None:
    values, candidates = torch.tensor([1.0, math.nan, 2.0]), torch.tensor([True, False, True])
    assert largest_on_cpu(values, candidates, 1).tolist() == [False, False, True]
    assert largest_on_device(values, candidates, torch.tensor(1)).tolist() == [False, False, True]


def test_nan_ranks_first_on_a_device() -> None:
    values = torch.tensor([1.0, math.inf, math.nan, 2.0])
    chosen = largest_on_device(values, torch.ones(4, dtype=torch.bool), torch.tensor(1))
    assert chosen.tolist() == [False, False, True, False]
