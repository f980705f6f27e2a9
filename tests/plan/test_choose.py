from __future__ import annotations

from itertools import chain, combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_export.plan.choose import least_lost, most_saved

Items = list[tuple[float, float]]
items = st.lists(st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0)), min_size=0, max_size=8)


def _subsets(n: int) -> list[tuple[int, ...]]:
    return list(chain.from_iterable(combinations(range(n), size) for size in range(n + 1)))


def _total(values: list[float], chosen: tuple[int, ...]) -> float:
    return sum(values[i] for i in chosen)


@given(items, st.floats(0.0, 3.0))
def test_the_most_saved_keeps_the_limit_and_beats_every_choice_that_keeps_it_with_room(
    found: Items, limit: float
) -> None:
    saved, lost = [a for a, _ in found], [b for _, b in found]
    chosen = most_saved(saved, lost, limit)
    assert _total(lost, chosen) <= limit * (1 + 1e-9)
    room = limit * (1 - len(found) / 10_000) - 1e-12
    best = max((_total(saved, s) for s in _subsets(len(found)) if _total(lost, s) <= room), default=0.0)
    assert _total(saved, chosen) >= best - 1e-9


@given(items, st.floats(0.01, 3.0))
def test_the_least_lost_reaches_what_is_wanted_and_beats_every_choice_that_reaches_more(
    found: Items, wanted: float
) -> None:
    saved, lost = [a for a, _ in found], [b for _, b in found]
    chosen = least_lost(saved, lost, wanted)
    if chosen is None:
        assert sum(saved) < wanted
        return
    assert _total(saved, chosen) >= wanted * (1 - 1e-9)
    more = wanted * (1 + len(found) / 10_000) + 1e-12
    best = min((_total(lost, s) for s in _subsets(len(found)) if _total(saved, s) >= more), default=None)
    if best is not None:
        assert _total(lost, chosen) <= best + 1e-9


def test_examples_by_hand() -> None:
    saved, lost = [6.0, 5.0, 5.0, 1.0], [0.6, 0.4, 0.4, 0.0]
    assert most_saved(saved, lost, 0.8) == (1, 2, 3)
    assert most_saved(saved, lost, 0.0) == (3,)
    assert most_saved(saved, lost, 2.0) == (0, 1, 2, 3)
    assert least_lost(saved, lost, 5.9) == (1, 3)
    assert least_lost(saved, lost, 17.0) == (0, 1, 2, 3)
    assert least_lost(saved, lost, 17.1) is None
    assert least_lost(saved, lost, 0.0) == ()


def test_two_hundred_layers_are_chosen_among_at_once() -> None:
    saved = [1.0 + (i * 7919 % 100) / 100 for i in range(200)]
    lost = [0.5 + (i * 104729 % 100) / 100 for i in range(200)]
    chosen = least_lost(saved, lost, 0.5 * sum(saved))
    assert chosen is not None
    density = sorted(range(200), key=lambda i: lost[i] / saved[i])
    greedy, at = 0.0, 0
    while sum(saved[i] for i in density[:at]) < 0.5 * sum(saved):
        greedy += lost[density[at]]
        at += 1
    assert sum(lost[i] for i in chosen) <= greedy


@pytest.mark.parametrize("limit", [0.0, 0.5])
def test_nothing_to_choose_from_is_an_empty_choice(limit: float) -> None:
    assert most_saved([], [], limit) == ()
    assert least_lost([], [], 1.0) is None
