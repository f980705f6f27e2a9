"""When masks move, by itself: no network, no optimiser."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_export.errors import UsageError
from sparse_export.train.methods import METHODS, OWN_LOOP_METHODS
from sparse_export.train.sparsity_config import SparsityConfig
from sparse_export.train.update_schedule import BackOff, UpdateSchedule, update_schedule

STEPS = st.integers(0, 300)
EVERY = st.integers(1, 40)
LENGTHS = st.one_of(st.none(), st.integers(1, 250))


def scheduled(method: str = "sparse-momentum", **settings: Any) -> UpdateSchedule:
    total_steps = settings.pop("total_steps", 100)
    schedule = "constant" if total_steps is None else "cosine"
    config = SparsityConfig(**{"method": method, "prune_schedule": schedule} | settings)
    return update_schedule(config, total_steps)


@given(st.sampled_from(sorted(OWN_LOOP_METHODS)), LENGTHS, STEPS, EVERY)
def test_the_next_update_is_the_first_step_at_which_one_is_due(
    method: str, total_steps: int | None, step: int, every: int
) -> None:
    schedule = scheduled(method, total_steps=total_steps)
    due = [later for later in range(step + 1, step + every + 1) if schedule.is_due(later, every)]
    found = schedule.next_update(step, every)
    assert due == ([] if found is None else [found])


@given(st.sampled_from(sorted(OWN_LOOP_METHODS)), st.integers(1, 250), EVERY)
def test_no_update_is_due_once_masks_stand_still_or_within_the_last_stretch(
    method: str, total_steps: int, every: int
) -> None:
    schedule = scheduled(method, total_steps=total_steps)
    due = [step for step in range(1, total_steps + every) if schedule.is_due(step, every)]
    assert all(step < schedule.end and step + every <= total_steps for step in due)
    assert bool(due) <= METHODS[method].moves
    assert schedule.is_frozen(schedule.end)
    assert schedule.end == 0 or not schedule.is_frozen(schedule.end - 1)


@pytest.mark.parametrize("method", ["rigl", "sparse-momentum"])
def test_the_rate_has_run_its_course_when_masks_begin_to_stand_still(method: str) -> None:
    schedule = scheduled(method)
    assert schedule.prune_rate(0) == pytest.approx(0.5)
    assert schedule.prune_rate(schedule.end) == pytest.approx(METHODS[method].final_prune_rate)


def test_an_explicit_freeze_of_masks_that_never_move_is_refused() -> None:
    with pytest.raises(UsageError, match="never moves its masks"):
        scheduled("static", freeze=1.0)


def test_a_rate_is_lowered_only_where_swaps_do_not_get_fewer_under_one_cap() -> None:
    first = BackOff().after(10, same_cap=True)
    assert (first.factor, first.n_flipped) == (1.0, 10)
    assert first.after(9, same_cap=True).factor == 1.0
    lowered = first.after(10, same_cap=True)
    assert lowered.factor < 1.0
    assert lowered.after(11, same_cap=True).factor == pytest.approx(lowered.factor**2)
    cut = first.after(50, same_cap=False)
    assert cut == BackOff()
    assert BackOff().after(0, same_cap=True).after(0, same_cap=True).factor == 1.0
