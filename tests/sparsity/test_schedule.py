"""The prune rate over time, against its closed forms."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_export.sparsity import PruneSchedule, prune_rate

steps = st.integers(0, 10_000)
initial_rates = st.floats(0.01, 1)


@given(steps, initial_rates)
def test_cosine_follows_half_a_wave_from_the_initial_to_the_final_rate(step: int, initial: float) -> None:
    expected = 0.005 + (initial - 0.005) * math.cos(math.pi * step / 20_000) ** 2
    assert prune_rate(step, 10_000, initial=initial) == pytest.approx(expected, abs=1e-12)


@given(steps, initial_rates)
def test_linear_falls_on_a_straight_line_to_zero(step: int, initial: float) -> None:
    rate = prune_rate(step, 10_000, initial=initial, schedule="linear")
    assert rate == pytest.approx(initial - step * initial / 10_000, abs=1e-12)


@given(steps, initial_rates, st.none() | st.integers(1, 100))
def test_constant_stays_and_needs_no_total(step: int, initial: float, total: int | None) -> None:
    assert prune_rate(step, total, initial=initial, schedule="constant") == initial


@pytest.mark.parametrize(
    ("schedule", "start", "middle", "end"),
    [("cosine", 0.5, 0.2525, 0.005), ("linear", 0.5, 0.25, 0.0), ("constant", 0.5, 0.5, 0.5)],
)
def test_start_middle_and_end(schedule: PruneSchedule, start: float, middle: float, end: float) -> None:
    at = [prune_rate(step, 100, initial=0.5, schedule=schedule) for step in (0, 50, 100)]
    assert at == pytest.approx([start, middle, end], abs=1e-15)


@given(steps, initial_rates, st.floats(0, 1))
def test_linear_falls_to_the_final_rate_that_is_asked_for(step: int, initial: float, share: float) -> None:
    final = share * initial
    rate = prune_rate(step, 10_000, initial=initial, final=final, schedule="linear")
    assert rate == pytest.approx(initial * (1 - step / 10_000) + final * step / 10_000, abs=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_final_rate_can_be_chosen(schedule: PruneSchedule) -> None:
    assert prune_rate(10, 10, initial=0.5, final=0.1, schedule=schedule) == pytest.approx(0.1)


def test_constant_has_no_other_end_than_its_start() -> None:
    with pytest.raises(ValueError, match=r"ends at 0\.5, and final is 0\.1"):
        prune_rate(0, None, initial=0.5, final=0.1, schedule="constant")


@given(st.integers(100, 10_000), st.sampled_from(("cosine", "linear", "constant")))
def test_past_the_end_the_rate_stays_at_its_end(step: int, schedule: PruneSchedule) -> None:
    end = prune_rate(100, 100, initial=0.5, schedule=schedule)
    assert prune_rate(step, 100, initial=0.5, schedule=schedule) == end


@given(st.integers(0, 99), st.sampled_from(("cosine", "linear")))
def test_the_rate_never_rises_and_stays_within_0_and_1(step: int, schedule: PruneSchedule) -> None:
    now, later = (prune_rate(s, 100, initial=1.0, schedule=schedule) for s in (step, step + 1))
    assert 0 <= later < now <= 1


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_falling_rate_without_a_total_is_refused(schedule: PruneSchedule) -> None:
    with pytest.raises(ValueError, match=f"The {schedule} prune schedule needs the total number of steps"):
        prune_rate(0, None, initial=0.5, schedule=schedule)
