"""What is counted in a weight piece by piece is what a plain loop over its groups finds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_export.graph import weight_counts
from sparse_export.graph.weight_counts import count_groups_over, count_weight, is_all_finite

Array = np.ndarray[Any, Any]
TYPES = (np.float32, np.float16, np.float64, np.int8, np.int64, np.uint8, np.bool_, np.complex64)


@st.composite
def weights(draw: st.DrawFn) -> tuple[Array, int, int]:
    """A weight in some order of memory, its reduction axis, and what is summed together."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    axis = draw(st.integers(0, len(shape) - 1))
    shape[axis] *= draw(st.sampled_from([1, 2, 4, 8, 16, 48]))
    drawn = np.random.default_rng(draw(st.integers(0, 2**32)))
    kept = drawn.random(shape) < draw(st.sampled_from([1.0, 0.6, 0.4, 0.1, 0.0]))
    values: Array = (drawn.normal(size=shape) * 50 * kept).astype(draw(st.sampled_from(TYPES)))
    order = draw(st.sampled_from(["C", "F", "backwards", "repeated"]))
    if order == "F":
        values = np.asfortranarray(values)
    elif order == "backwards":
        values = values[::-1]
    elif order == "repeated":
        values = np.broadcast_to(values[:1], values.shape)
    n_groups = draw(st.sampled_from([n for n in (1, 2, 3) if shape[axis] % n == 0]))
    return values, axis, shape[axis] // n_groups


def groups(values: Array, axis: int, m: int) -> list[int]:
    """Nonzeros of every group, one after the other."""
    lines = np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])
    return [sum(one != 0 for one in line[i : i + m]) for line in lines for i in range(0, len(line), m)]


@pytest.mark.parametrize("piece", [20, 2**16])
@given(weights())
def test_counts_are_those_of_a_loop(piece: int, drawn: tuple[Array, int, int]) -> None:
    values, axis, n_reduced = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_counts, "_PIECE", piece)
        found = count_weight(values, axis, n_reduced)
    assert found.n_nonzero == sum(one != 0 for one in values.ravel())
    divides = []
    for m in (2, 4, 8, 16):
        if n_reduced % m:
            break
        divides.append(m)
    assert found.most == {m: max(groups(values, axis, m)) for m in divides}
    if 4 in divides:
        counts = groups(values, axis, 4)
        assert found.over == (sum(n > 2 for n in counts), len(counts))
        assert count_groups_over(values, axis, n_reduced, n=2, m=4) == found.over
    else:
        assert found.over is None
    assert found.has_sums == (4 in divides and values.dtype != np.complex64)
    if found.has_sums:
        magnitudes = np.moveaxis(np.abs(values.astype(np.float64)), axis, -1).reshape(-1, 4)
        magnitudes.sort(axis=1)
        assert (found.kept, found.dropped) == pytest.approx(
            (magnitudes[:, 2:].sum(), magnitudes[:, :2].sum()), rel=1e-12, abs=0
        )


@pytest.mark.parametrize(
    ("counts", "obeys"),
    [
        ({2: 2, 4: 2, 8: 4}, ("2:4",)),
        ({2: 2, 4: 2, 8: 3}, ("2:4", "3:8")),
        ({2: 2, 4: 4, 8: 8, 16: 12}, ("12:16",)),
        ({2: 1}, ("1:2",)),
        ({2: 0, 4: 0}, ("1:2", "1:4")),
        ({}, ()),
    ],
)
def test_patterns_that_follow_from_smaller_ones_are_left_out(
    counts: dict[int, int], obeys: tuple[str, ...]
) -> None:
    assert weight_counts.WeightCounts(most=counts).obeys == obeys


def test_a_full_group_of_eight_hides_no_pattern_over_sixteen() -> None:
    weight = np.zeros((32, 3), np.float32)
    weight[:8] = 1
    weight[16:26] = 1
    assert count_weight(weight, 0, 32).most == {2: 2, 4: 4, 8: 8, 16: 10}


def test_an_empty_weight_has_no_groups_and_no_magnitude() -> None:
    found = count_weight(np.zeros((8, 0), np.float32), 0, 8)
    assert (found.n_nonzero, found.over, found.obeys, found.has_sums) == (0, (0, 0), (), False)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_one_value_that_is_not_finite_is_seen(
    bad: float, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_counts, "_PIECE", 64)
    values = np.ones((40, 12), dtype)
    assert is_all_finite(values)
    assert count_weight(values, 0, 40).is_finite
    values[37, 11] = bad
    assert not is_all_finite(values)
    found = count_weight(values, 0, 40)
    assert (found.has_sums, found.is_finite, found.n_nonzero) == (True, False, 480)
