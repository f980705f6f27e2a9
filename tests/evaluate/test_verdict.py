"""One wording of what a ratio of times shows, for every command."""

from __future__ import annotations

import pytest

from sparse_export.errors import SpeedupNotReached
from sparse_export.evaluate.verdict import (
    floor_text,
    outcome_text,
    speedup_not_reached,
    times_text,
    verdict_of,
)
from sparse_export.instruments.statistics import Ratio


def ratio(low: float, estimate: float, high: float) -> Ratio:
    return Ratio(estimate=estimate, low=low, high=high, n_rounds=24, n_outliers=0, autocorrelation=0.0)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (ratio(1.15, 1.2, 1.25), "speed-up of 1.200x [1.150, 1.250]"),
        (ratio(0.75, 0.8, 0.85), "slow-down, sparse takes 1.250x as long [1.176, 1.333]"),
        (ratio(1.005, 1.2, 1.25), "not told apart; dense / sparse is 1.200 [1.005, 1.250]"),
        (ratio(0.99, 1.0, 1.02), "no speed-up; dense / sparse is 1.000 [0.990, 1.020]"),
    ],
)
def test_a_ratio_is_claimed_only_beyond_the_floor(found: Ratio, wanted: str) -> None:
    assert outcome_text(found, 1.01) == wanted
    assert outcome_text(found, 1.01, sparse="2:4") == wanted.replace("sparse", "2:4")


def test_a_verdict_says_what_was_found_then_why_then_what_to_doubt() -> None:
    control = ratio(1.01, 1.02, 1.04)
    found = verdict_of(
        ratio(1.2, 1.3, 1.4), control, copies="two copies", steady=False, why=["A reason."], at="Batch 8"
    )
    assert (found.outcome, found.floor) == ("speed-up", 1.04)
    assert found.text.startswith(
        "Batch 8: speed-up of 1.300x [1.200, 1.400]; two copies differ here by up to 4.0 %. A reason. The "
        "control "
        "itself misses 1"
    )
    assert found.text.endswith("repeat on a quiet machine.")


def test_a_verdict_of_one_measurement_starts_with_the_outcome() -> None:
    even = ratio(0.99, 1.0, 1.01)
    found = verdict_of(even, even, copies="two dense networks", steady=True, why=())
    assert (
        found.text
        == f"No speed-up; dense / sparse is {even}; {floor_text(found.floor, 'two dense networks')}."
    )


def test_a_speed_up_that_is_missed_is_told_with_its_interval() -> None:
    error = speedup_not_reached(f"It is {times_text(ratio(1.0, 1.1, 1.2))}.", 1.5, do="Promise less.")
    assert isinstance(error, SpeedupNotReached)
    assert str(error) == (
        "It is 1.100x [1.000, 1.200]. At least 1.5x was required, at the lower end of the interval. Promise "
        "less."
    )
