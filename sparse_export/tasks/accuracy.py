"""Accuracies and their differences in words: the one wording of every table and sentence."""

from __future__ import annotations

import math
from typing import Protocol

from sparse_export.errors import UsageError
from sparse_export.formats.run import Accuracy
from sparse_export.instruments.statistics import Mean

__all__ = [
    "accuracy_text",
    "difference_text",
    "drop_points",
    "lost_too_much",
    "mean_percent_text",
    "percent_text",
    "points_text",
    "require_possible_drop",
]

_ROUNDING_POINTS = 1e-9
NOT_MEASURED = "not measured"


class Difference(Protocol):
    """A paired difference of two accuracies, in percentage points, with its 95 % interval."""

    @property
    def points(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def mcnemar_p(self) -> float: ...


def percent_text(accuracy: Accuracy | None, missing: str = NOT_MEASURED) -> str:
    """Like `98.20 %`."""
    return missing if accuracy is None else f"{accuracy.percent:.2f} %"


def accuracy_text(accuracy: Accuracy | None, missing: str = NOT_MEASURED) -> str:
    """Like `98.20 % (982/1000)`."""
    if accuracy is None:
        return missing
    return f"{accuracy.percent:.2f} % ({accuracy.n_correct}/{accuracy.n_samples})"


def mean_percent_text(mean: Mean | None) -> str:
    """Like `98.20 ± 0.07`; without an interval for a single run."""
    if mean is None:
        return "-"
    return f"{mean.mean:.2f}" if mean.half_width is None else f"{mean.mean:.2f} ± {mean.half_width:.2f}"


def points_text(points: float) -> str:
    """Signed percentage points, like `-0.20 points`; a difference that is not zero never reads so."""
    return f"{_number(points, '+')} points"


def difference_text(difference: Difference, *, p_value: bool = False) -> str:
    """Like `-0.20 points [-0.35, -0.05]`, the brackets being the 95 % interval.

    Args:
        difference: of two accuracies on the same samples.
        p_value: add the p-value of McNemar's test.
    """
    interval = f"[{_number(difference.low, '+')}, {_number(difference.high, '+')}]"
    text = f"{points_text(difference.points)} {interval}"
    return f"{text}, McNemar p {difference.mcnemar_p:.3g}" if p_value else text


def drop_points(accuracy: Accuracy | None, reference: Accuracy | None) -> float | None:
    """Percentage points that an accuracy lies below its reference; None where either is not known."""
    return None if accuracy is None or reference is None else reference.percent - accuracy.percent


def lost_too_much(what: str, lost: float | None, than: str, allowed: float | None) -> str | None:
    """Say that more accuracy is lost than may be, by more than percentages round.

    Args:
        what: whose accuracy it is, like `the sparse accuracy`.
        lost: percentage points below the reference; None where nobody knows.
        than: the reference, like `the recorded one`.
        allowed: percentage points that may be lost; None for any number.

    Returns:
        A clause, or None where no more is lost.
    """
    if lost is None or allowed is None or lost <= allowed + _ROUNDING_POINTS:
        return None
    return f"{what} is {_number(lost)} points below {than}, more than {allowed:g}"


def require_possible_drop(max_drop: float | None) -> None:
    """Check a bound on the accuracy that may be lost.

    Raises:
        UsageError: it is no number of percentage points, 0 or more.
    """
    if max_drop is not None and not (math.isfinite(max_drop) and max_drop >= 0):
        raise UsageError(
            f"The allowed drop is {max_drop} points.",
            expected="A finite number of percentage points of at least 0 was expected.",
        )


def _number(points: float, sign: str = "") -> str:
    return f"{points:{sign}.2f}" if abs(points) >= 0.005 or abs(points) < 1e-9 else f"{points:{sign}.1g}"
