"""When a comparison of times has seen enough."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from sparse_export.instruments.looks import FEWEST_ROUNDS, Looks
from sparse_export.instruments.outcome import outcome_of
from sparse_export.instruments.statistics import Ratio, paired_ratio, resolution

__all__ = ["Deciding", "Ended", "Round"]

Ended = Literal["decided", "rounds", "budget"]
Round = Callable[[int, int, float], None]
"""Gets the rounds that were measured, the most that will be, and the seconds left at most."""

_A_MOMENT_S = 0.01  # 0 seconds left says that it has ended


class Deciding:
    """Looks at the times of `dense`, `dense again` and `sparse` after each round.

    A look decides when dense and sparse are told apart, or any difference is negligible; where a speed-up is
    required, when the interval lies on one side of it. Without a decision the measurement ends with its last
    round, or when the next round would go beyond the budget.

    Attributes:
        ended: why it did; None as long as it goes on.
    """

    def __init__(
        self,
        looks: Looks,
        *,
        budget_s: float,
        required: float | None = None,
        on_round: Round | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock.

        Args:
            looks: the rounds at which the times are looked at.
            budget_s: seconds, warm-up included. The 4 rounds that an interval needs are measured in any case.
            required: the speed-up that is required, if any.
            on_round: told of each round.
            clock: seconds, monotonic.
        """
        self.ended: Ended | None = None
        self._looks, self._budget_s, self._required = looks, budget_s, required
        self._on_round, self._clock = on_round, clock
        self._began = clock()
        self._first: float | None = None

    def __call__(self, samples_ms: Mapping[str, Sequence[float]]) -> bool:
        """Say whether the round that was just measured was the last.

        Args:
            samples_ms: one value a round, by name.
        """
        n, most, now = len(samples_ms["dense"]), self._looks.rounds[-1], self._clock()
        spent = now - self._began
        if self._first is None:
            self._first = now
        a_round = (now - self._first) / (n - 1) if n > 1 else 0.0  # the first one has the warm-up before it
        left = min(self._budget_s - spent, (most - n) * a_round) if n > 1 else self._budget_s - spent
        if n in self._looks.rounds and self._is_decided(samples_ms):
            self.ended = "decided"
        elif n >= most:
            self.ended = "rounds"
        elif n >= FEWEST_ROUNDS and spent + a_round > self._budget_s:
            self.ended = "budget"
        if self._on_round is not None:
            self._on_round(n, most, 0.0 if self.ended else max(left, _A_MOMENT_S))
        return self.ended is not None

    def ratios(self, samples_ms: Mapping[str, Sequence[float]]) -> tuple[Ratio, Ratio]:
        """Dense / sparse, and the control dense / dense again, with the intervals of a look."""
        confidence = self._looks.confidence
        dense = samples_ms["dense"]
        return (
            paired_ratio(dense, samples_ms["sparse"], confidence=confidence),
            paired_ratio(dense, samples_ms["dense again"], confidence=confidence),
        )

    def _is_decided(self, samples_ms: Mapping[str, Sequence[float]]) -> bool:
        ratio, control = self.ratios(samples_ms)
        outcome = outcome_of(ratio, resolution(control))
        if self._required is None:
            return outcome != "not told apart"
        return ratio.high < self._required or (outcome == "speed-up" and ratio.low >= self._required)
