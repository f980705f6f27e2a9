from __future__ import annotations

import numpy as np
import pytest

from sparse_export.evaluate.deciding import Deciding, Ended
from sparse_export.instruments.looks import looks_of


def _end(
    ratio: float,
    *,
    noise: float = 0.002,
    budget_s: float = 1e9,
    required: float | None = None,
    round_s: float = 1.0,
) -> tuple[Ended | None, int]:
    """Why and after how many rounds of dense / sparse the measurement ends, by a clock of its own."""
    rng = np.random.default_rng(3)
    now = [0.0]
    deciding = Deciding(looks_of(40), budget_s=budget_s, required=required, clock=lambda: now[0])
    series: dict[str, list[float]] = {"dense": [], "dense again": [], "sparse": []}
    for n in range(1, 41):
        now[0] += round_s
        for name, level in (("dense", ratio), ("dense again", ratio), ("sparse", 1.0)):
            series[name].append(level * float(np.exp(noise * rng.standard_normal())))
        if deciding(series):
            return deciding.ended, n
    return deciding.ended, 41


@pytest.mark.parametrize("ratio", [1.5, 0.7, 1.0])
def test_what_is_plain_is_decided_at_the_first_look(ratio: float) -> None:
    assert _end(ratio) == ("decided", 8)


def test_what_is_not_told_apart_goes_on_to_the_last_round() -> None:
    assert _end(1.0, noise=0.3) == ("rounds", 40)


def test_the_next_round_is_not_begun_where_it_would_go_beyond_the_budget() -> None:
    assert _end(1.0, noise=0.3, budget_s=6.5) == ("budget", 6)


def test_four_rounds_are_measured_in_any_case() -> None:
    assert _end(1.0, noise=0.3, budget_s=0.1) == ("budget", 4)


def test_a_required_speed_up_is_decided_on_one_side_of_it() -> None:
    assert _end(1.5, required=1.2) == ("decided", 8)
    assert _end(1.1, required=1.2) == ("decided", 8)
    assert _end(1.2, required=1.2, noise=0.01)[0] == "rounds"


def test_each_round_is_told_with_the_time_left_at_most() -> None:
    told: list[tuple[int, int, float]] = []
    times = iter(range(0, 100, 2))
    deciding = Deciding(
        looks_of(8), budget_s=100, on_round=lambda *one: told.append(one), clock=lambda: next(times)
    )
    series: dict[str, list[float]] = {"dense": [], "dense again": [], "sparse": []}
    for n in range(8):
        for values in series.values():
            values.append(1.0 + 0.5 * (n % 3))
        deciding(series)
    assert told[0][:2] == (1, 8)
    assert told[1] == (2, 8, 12.0)  # six rounds of two seconds
    assert told[-1] == (8, 8, 0.0)
