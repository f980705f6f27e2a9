"""A measurement that ends as soon as it is decided: looks at fixed rounds, which share the error among them.

Looking at a growing series again and again, and stopping at the first interval that lies beyond 1, would
claim a difference between two copies of one file far more often than one time in twenty. So the rounds at
which the series is looked at are fixed beforehand, and each look gets an equal share of the 5 %: by the union
bound the intervals of all looks together hold the true ratio in 95 % of measurements, however the looks
depend on each other. Pocock's exact boundaries (Biometrika 64, 1977) assume independent normal increments,
which blocks on a busy machine are not, and would make intervals 6 % narrower at five looks.
`benchmarks/look_coverage.py` simulates the coverage with the autocorrelation of real blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparse_export.errors import UsageError

__all__ = ["FEWEST_ROUNDS", "Looks", "looks_of"]

FEWEST_ROUNDS = 4  # that an interval needs
_FIRST = 8
_GROWTH = 1.5
_APART = 1.2  # the last look, over the one before it, at least
_ERROR = 0.05


@dataclass(frozen=True, kw_only=True)
class Looks:
    """When a growing series is looked at, and how sure each look has to be.

    Attributes:
        rounds: ascending; the last is the most that is measured.
        confidence: of the interval at each look, between 0 and 1; all together have 0.95.
    """

    rounds: tuple[int, ...]
    confidence: float


def looks_of(most: int) -> Looks:
    """Choose the looks: at 8 rounds, then at half as many again, up to the most.

    Args:
        most: rounds.

    Raises:
        UsageError: fewer than the first look has.
    """
    if most < _FIRST:
        raise UsageError(
            f"{most} rounds are too few: the first look at the times comes after {_FIRST}.",
            do=f"Allow {_FIRST} rounds at least.",
        )
    rounds, at = [], _FIRST
    while at <= most / _APART:
        rounds.append(at)
        at = round(at * _GROWTH)
    rounds.append(most)
    return Looks(rounds=tuple(rounds), confidence=1.0 - _ERROR / len(rounds))
