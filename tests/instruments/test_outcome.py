from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sparse_export.errors import UsageError
from sparse_export.instruments.outcome import (
    NEGLIGIBLE,
    doubts,
    outcome_of,
    reaches,
    require_possible_speedup,
)
from sparse_export.instruments.statistics import Ratio

TURNED = {
    "speed-up": "slow-down",
    "slow-down": "speed-up",
    "no difference": "no difference",
    "not told apart": "not told apart",
}
ends = st.floats(min_value=0.25, max_value=4.0)
floors = st.floats(min_value=1.0, max_value=2.0)


def _ratio(low: float, high: float) -> Ratio:
    return Ratio(
        estimate=(low * high) ** 0.5, low=low, high=high, n_rounds=20, n_outliers=0, autocorrelation=0.0
    )


@given(a=ends, b=ends, floor=floors)
def test_a_turned_ratio_has_the_opposite_outcome(a: float, b: float, floor: float) -> None:
    low, high = sorted((a, b))
    for end in (low, high):  # where an end is the floor, the rounding of 1 / end decides
        for bound in (floor, 1 / floor, NEGLIGIBLE, 1 / NEGLIGIBLE):
            assume(abs(end - bound) > 1e-9)
    found = outcome_of(_ratio(low, high), floor)
    assert outcome_of(_ratio(1 / high, 1 / low), floor) == TURNED[found]


@given(a=ends, b=ends, floor=floors)
def test_an_interval_that_touches_what_cannot_be_resolved_claims_nothing(
    a: float, b: float, floor: float
) -> None:
    low, high = min(a, b, floor), max(a, b, 1 / floor)
    assert outcome_of(_ratio(low, high), floor) in {"no difference", "not told apart"}


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (0.98, 1.02, "no difference"),
        (1.005, 1.02, "no difference"),
        (0.96, 1.02, "not told apart"),
        (0.98, 1.04, "not told apart"),
    ],
)
def test_no_difference_is_claimed_only_where_a_larger_one_is_excluded(
    low: float, high: float, outcome: str
) -> None:
    assert outcome_of(_ratio(low, high), 1.01) == outcome


def test_only_the_lower_end_of_a_speed_up_reaches_what_is_required() -> None:
    ratio = _ratio(1.2, 1.5)
    assert reaches("speed-up", ratio, 1.2)
    assert not reaches("speed-up", ratio, 1.3)
    assert not reaches("no difference", ratio, 1.2)


def test_a_control_that_misses_1_and_restless_times_are_told() -> None:
    assert doubts(_ratio(0.9, 1.1), steady=True) == []
    assert len(doubts(_ratio(1.01, 1.1), steady=True)) == 1
    assert len(doubts(_ratio(1.01, 1.1), steady=False)) == 2


@pytest.mark.parametrize("required", [0.5, float("nan"), float("inf"), -1.0])
def test_a_speed_up_that_means_nothing_cannot_be_required(required: Any) -> None:
    with pytest.raises(UsageError, match=r"required speed-up is .* Write 2\."):
        require_possible_speedup(required, example="Write 2.")


def test_a_ratio_is_told_with_its_interval() -> None:
    assert str(_ratio(1.0, 1.21)) == "1.100 [1.000, 1.210]"
