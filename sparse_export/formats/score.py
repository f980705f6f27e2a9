"""A score: how well a network does its task on a set of samples."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

from sparse_export.errors import UsageError
from sparse_export.formats.document import Count, Positive

__all__ = ["ACCURACY", "Score"]

ACCURACY = "accuracy"


@dataclass(frozen=True, kw_only=True)
class Score:
    """How well a network does its task on a set of samples.

    `Score(n_correct=387, n_samples=400)` is an accuracy. Any other score has a name and a value.

    Attributes:
        n_samples: at least 1.
        n_correct: of a share of right answers, from 0 to n_samples; None of other scores.
        name: as people call it, like `RMSE`.
        value: in its own unit; a share lies between 0 and 1. Of a share of right answers it may be left out.
        higher_is_better: False for an error.
        is_share: it lies between 0 and 1 (a correlation between -1 and 1), and is shown in percent.

    Raises:
        UsageError: numbers that cannot be.
    """

    n_samples: Positive
    n_correct: Count | None = None
    name: str = ACCURACY
    value: float | None = None
    higher_is_better: bool = True
    is_share: bool = True

    def __post_init__(self) -> None:
        for name in ("n_samples",) if self.n_correct is None else ("n_samples", "n_correct"):
            given = getattr(self, name)
            try:
                object.__setattr__(self, name, operator.index(given))
            except TypeError as cause:
                raise UsageError(
                    f"{name} of a score is {given!r}, not a count of samples.",
                    do="Count samples; a score that is no share of right answers has a value instead.",
                ) from cause
        if self.n_samples < 1 or not 0 <= (self.n_correct or 0) <= self.n_samples:
            raise UsageError(
                f"A score has {self.n_correct} right answers among {self.n_samples} samples.",
                expected="There has to be 1 sample at least, and no more right answers than samples.",
            )
        if self.n_correct is not None:
            object.__setattr__(self, "value", self.n_correct / self.n_samples)
        elif self.value is None:
            raise UsageError(
                f"The score {self.name} of {self.n_samples} samples has neither n_correct nor a value.",
                do="Give one of them.",
            )
        if not math.isfinite(self.figure) or (self.is_share and not -100 <= self.figure <= 100):
            raise UsageError(
                f"The score {self.name} has the value {self.value!r}.",
                expected="A share is at most 1; any other value has to be finite.",
                do="Give is_share=False for a score that is no share." if self.is_share else "",
            )

    @property
    def figure(self) -> float:
        """The value as it is shown: a share in percent."""
        assert self.value is not None
        return 100.0 * self.value if self.is_share else float(self.value)

    @property
    def unit(self) -> str:
        """Of a difference: `points` of percent for a share, empty for others."""
        return "points" if self.is_share else ""

    def worse_by(self, other: Score) -> float:
        """How much worse this one is than another of the same kind, in the unit that both are shown in.

        Args:
            other: the better one, for a result above 0.
        """
        apart = other.figure - self.figure
        return apart if self.higher_is_better else -apart
