"""What a ratio of times may be said to show, beside the control that was timed with it."""

from __future__ import annotations

from typing import Literal

from sparse_export.errors import UsageError
from sparse_export.instruments.statistics import Ratio

__all__ = ["NEGLIGIBLE", "Outcome", "doubts", "outcome_of", "reaches", "require_possible_speedup"]

Outcome = Literal["speed-up", "slow-down", "no difference", "not told apart"]
NEGLIGIBLE = 1.03
"""A ratio whose whole interval lies between this and its inverse is no difference that matters."""


def outcome_of(ratio: Ratio, floor: float) -> Outcome:
    """Decide what the interval of a ratio shows.

    Args:
        ratio: dense / sparse.
        floor: of the control, see `sparse_export.instruments.statistics.resolution`.

    Returns:
        Either direction only where the whole interval lies beyond the floor; no difference only where it lies
        within `NEGLIGIBLE` of 1; else the measurement did not tell the two apart.
    """
    if ratio.low > floor:
        return "speed-up"
    if ratio.high < 1.0 / floor:
        return "slow-down"
    small = ratio.low >= 1.0 / NEGLIGIBLE and ratio.high <= NEGLIGIBLE
    return "no difference" if small else "not told apart"


def doubts(control: Ratio, *, steady: bool) -> list[str]:
    """Sentences that say why a verdict is to be read with care.

    steady: were all times, when warm-up ended?
    """
    found = []
    if not control.low <= 1.0 <= control.high:
        found.append("The control itself misses 1: smaller differences than its own mean nothing here.")
    if not steady:
        found.append("Times had not become steady when warm-up ended; repeat on a quiet machine.")
    return found


def reaches(outcome: str, ratio: Ratio, required: float) -> bool:
    """Is a required speed-up there, at the lower end of the interval?"""
    return outcome == "speed-up" and ratio.low >= required


def require_possible_speedup(required: float | None, *, example: str) -> None:
    """Raise UsageError for a required speed-up without meaning. example: of one that has some, a sentence."""
    if required is not None and not 1 <= required < float("inf"):
        raise UsageError(
            f"The required speed-up is {required}.",
            expected="A finite ratio of at least 1 was expected.",
            do=example,
        )
