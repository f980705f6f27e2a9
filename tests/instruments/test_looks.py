from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.look_coverage import coverage_of
from sparse_export.errors import UsageError
from sparse_export.instruments.looks import looks_of


def test_looks_are_at_half_as_many_rounds_again() -> None:
    found = looks_of(40)
    assert found.rounds == (8, 12, 18, 27, 40)
    assert found.confidence == pytest.approx(0.99)


@given(most=st.integers(8, 500))
def test_the_last_look_is_at_the_most_rounds_and_errors_add_up_to_one_in_twenty(most: int) -> None:
    found = looks_of(most)
    assert found.rounds[-1] == most
    assert list(found.rounds) == sorted(set(found.rounds))
    assert len(found.rounds) * (1 - found.confidence) == pytest.approx(0.05)


def test_fewer_rounds_than_the_first_look_has_are_refused() -> None:
    with pytest.raises(UsageError, match="7 rounds are too few"):
        looks_of(7)


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.6])
def test_the_interval_at_the_end_holds_the_truth_in_95_of_100_measurements_that_may_end_early(
    rho: float,
) -> None:
    """200 measurements each, see benchmarks/look_coverage.py for more."""
    found = coverage_of(rho, np.log(1.04), sigma=0.02, most=40, n_runs=200, seed=5)
    assert found.share >= 0.94
    assert found.mean_rounds < 40
