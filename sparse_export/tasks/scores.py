"""Scores and their differences in words, as every table and sentence has them, and how much may be lost."""

from __future__ import annotations

import math

from sparse_export.errors import UsageError
from sparse_export.formats.score import Score
from sparse_export.instruments.paired_scores import ScoreDifference
from sparse_export.instruments.statistics import Mean

__all__ = [
    "MaxDrop",
    "allowed_drop",
    "allowed_text",
    "better_text",
    "capitalized",
    "change_text",
    "difference_text",
    "drop_of",
    "lost_too_much",
    "mean_text",
    "require_possible_drop",
    "score_text",
    "value_text",
]

NOT_MEASURED = "not measured"
_ROUNDING = 1e-9
_ROUNDING_SHARE = 1e-6

MaxDrop = float | str
"""How much worse a score may get: in the unit that it is shown in, or, like `2%`, as a share of it."""


def capitalized(text: str) -> str:
    """The start of a sentence: with a capital, unless its first word has one of its own, as mAP."""
    first = text.split(maxsplit=1)[0]
    return text if first != first.lower() else text[0].upper() + text[1:]


def value_text(score: Score | None, missing: str = NOT_MEASURED) -> str:
    """Like `98.20 %`, or `0.1234` of a score that is no share."""
    if score is None:
        return missing
    return f"{score.figure:.2f} %" if score.is_share else f"{score.figure:.4g}"


def score_text(score: Score | None, missing: str = NOT_MEASURED) -> str:
    """Like `98.20 % (982/1000)`, or `0.1234 (1000 samples)`."""
    if score is None:
        return missing
    of = f"{score.n_samples} samples" if score.n_correct is None else f"{score.n_correct}/{score.n_samples}"
    return f"{value_text(score)} ({of})"


def better_text(score: Score) -> str:
    """`higher is better`, or `lower is better`."""
    return "higher is better" if score.higher_is_better else "lower is better"


def mean_text(mean: Mean | None, *, is_share: bool = True) -> str:
    """Like `98.20 ± 0.07` of a share, in percent, or `1.138 ± 0.012`; a single run has no interval."""
    if mean is None:
        return "-"
    amount, half = (f"{one:.2f}" if is_share else f"{one:.4g}" for one in (mean.mean, mean.half_width or 0.0))
    return amount if mean.half_width is None else f"{amount} ± {half}"


def change_text(amount: float, *, is_share: bool = True, of: float | None = None) -> str:
    """Signed, like `-0.20 points`, or `+0.0123`; a difference that is not zero never reads so.

    Args:
        amount: the difference.
        is_share: of shares in percent.
        of: the score that it is a change of: less than a millionth of that is what runtimes round, and `0`.
    """
    amount = _unless_rounding(amount, of)
    return f"{_number(amount, '+')} points" if is_share else _signed(amount)


def _unless_rounding(amount: float, of: float | None) -> float:
    return 0.0 if of is not None and abs(amount) <= _ROUNDING_SHARE * abs(of) else amount


def _signed(amount: float) -> str:
    return f"{amount:+.4g}" if amount else "0"


def difference_text(
    difference: ScoreDifference, *, is_share: bool = True, p_value: bool = False, of: float | None = None
) -> str:
    """Like `-0.20 points [-0.35, -0.05]`, the brackets being the 95 % interval.

    Args:
        difference: of two scores on the same samples.
        is_share: whether they are shares.
        p_value: add the p-value of McNemar's test, or how many resamples a bootstrap had.
        of: as of `change_text`.
    """
    low, high = (_unless_rounding(one, of) for one in (difference.low, difference.high))
    if is_share:
        interval = f"[{_number(low, '+')}, {_number(high, '+')}]"
    else:
        interval = f"[{_signed(low)}, {_signed(high)}]"
    text = f"{change_text(difference.amount, is_share=is_share, of=of)} {interval}"
    if p_value and difference.mcnemar_p is not None:
        return f"{text}, McNemar p {difference.mcnemar_p:.3g}"
    if p_value and difference.n_resamples is not None:
        return f"{text}, bootstrap of {difference.n_resamples:,}"
    return text


def drop_of(score: Score | None, reference: Score | None) -> float | None:
    """How much worse a score is than its reference, in the unit of both; None where either is not known."""
    return None if score is None or reference is None else score.worse_by(reference)


def lost_too_much(
    what: str, lost: float | None, than: str, max_drop: MaxDrop | None, reference: Score | None = None
) -> str | None:
    """Say that a score is worse than it may be, by more than numbers round.

    Args:
        what: the score, like `the sparse accuracy`.
        lost: how much worse it is than the reference; None where nobody knows.
        than: the reference, like `the recorded one`.
        max_drop: what may be lost; None for any amount.
        reference: the score itself; None for a share that should be 100 %.

    Returns:
        A clause, or None where no more is lost.
    """
    if lost is None or max_drop is None:
        return None
    rounding = _ROUNDING
    if reference is not None and reference.n_correct is None:  # runtimes sum in other orders
        rounding = max(rounding, _ROUNDING_SHARE * abs(reference.figure))
    if lost <= allowed_drop(max_drop, reference) + rounding:
        return None
    side = "above" if reference is not None and not reference.higher_is_better else "below"
    points = reference is None or reference.is_share
    amount = f"{_number(lost)} points" if points else f"{lost:.4g}"
    of_it = " of it" if isinstance(max_drop, str) and max_drop.strip().endswith("%") else ""
    return f"{what} is {amount} {side} {than}, more than {_plain(max_drop)}{of_it}"


def allowed_drop(max_drop: MaxDrop, reference: Score | None = None) -> float:
    """How much worse a score may be than its reference, in the unit of both.

    Args:
        max_drop: as it was given.
        reference: the score; None for a share that should be 100 %.

    Raises:
        UsageError: it is no amount.
    """
    amount, relative = _parsed(max_drop)
    whole = 100.0 if reference is None else abs(reference.figure)
    return amount * whole / 100.0 if relative else amount


def allowed_text(max_drop: MaxDrop, reference: Score | None = None) -> str:
    """Like `at most 0.5 points may be lost`."""
    amount, relative = _parsed(max_drop)
    if relative:
        return f"at most {amount:g} % of it may be lost"
    points = " points" if reference is None or reference.is_share else ""
    return f"at most {amount:g}{points} may be lost"


def require_possible_drop(max_drop: MaxDrop | None) -> None:
    """Check a bound on what may be lost.

    Raises:
        UsageError: it is no finite number of at least 0, with or without a percent sign.
    """
    if max_drop is not None:
        _parsed(max_drop)


def _parsed(max_drop: MaxDrop) -> tuple[float, bool]:
    """The number, and whether it is a percentage of the score. Raises UsageError."""
    text = str(max_drop).strip()
    relative = text.endswith("%")
    try:
        amount = float(text.removesuffix("%"))
    except ValueError:
        amount = math.nan
    if not (math.isfinite(amount) and amount >= 0):
        raise UsageError(
            f"The allowed drop is {max_drop}.",
            expected="A finite number of at least 0 was expected: points of a score in percent, the score's "
            "own unit for another, or a share of it like 2%.",
        )
    return amount, relative


def _plain(max_drop: MaxDrop) -> str:
    amount, relative = _parsed(max_drop)
    return f"{amount:g} %" if relative else f"{amount:g}"


def _number(points: float, sign: str = "") -> str:
    return f"{points:{sign}.2f}" if abs(points) >= 0.005 or abs(points) < 1e-9 else f"{points:{sign}.1g}"
