"""What a ratio of times and its A/A control may be said to show: the one wording of every command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparse_export.errors import SpeedupNotReached
from sparse_export.instruments.outcome import Outcome, doubts, outcome_of
from sparse_export.instruments.statistics import Ratio, resolution

__all__ = ["Verdict", "floor_text", "outcome_text", "speedup_not_reached", "times_text", "verdict_of"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a ratio shows.

    Attributes:
        outcome: of the ratio's interval against the floor.
        floor: the farthest end of the control's interval from 1, as a ratio above 1.
        text: sentences that say the outcome and why.
    """

    outcome: Outcome
    floor: float
    text: str


def verdict_of(
    ratio: Ratio, control: Ratio, *, copies: str, steady: bool, why: Sequence[str], at: str = ""
) -> Verdict:
    """Judge a ratio dense / sparse beside its control.

    Either direction is claimed only when the whole interval of the ratio lies beyond 1 and beyond the
    farthest that the control's interval reaches from 1.

    Args:
        ratio: of times, above 1 when sparse is faster.
        control: dense / the same again.
        copies: what the control compared, like `two copies of the dense file`.
        steady: whether times had settled when warm-up ended.
        why: sentences that explain the outcome.
        at: where it was measured, like `Batch 1`.
    """
    floor = resolution(control)
    headline = f"{outcome_text(ratio, floor)}; {floor_text(floor, copies)}."
    headline = f"{at}: {headline}" if at else f"{headline[0].upper()}{headline[1:]}"
    text = " ".join([headline, *why, *doubts(control, steady=steady)])
    return Verdict(outcome=outcome_of(ratio, floor), floor=floor, text=text)


def outcome_text(ratio: Ratio, floor: float, *, sparse: str = "sparse") -> str:
    """A ratio dense / sparse in words, as far as the floor lets anything be said.

    Args:
        sparse: what was timed.
    """
    outcome = outcome_of(ratio, floor)
    if outcome == "speed-up":
        return f"speed-up of {times_text(ratio)}"
    if outcome == "slow-down":
        slower, low, high = 1 / ratio.estimate, 1 / ratio.high, 1 / ratio.low
        return f"slow-down, {sparse} takes {slower:.3f}x as long [{low:.3f}, {high:.3f}]"
    said = "no speed-up" if outcome == "no difference" else "not told apart"
    return f"{said}; dense / {sparse} is {ratio}"


def floor_text(floor: float, copies: str) -> str:
    """What cannot be resolved: by how much two of the same differ."""
    return f"{copies} differ here by up to {100 * (floor - 1):.1f} %"


def times_text(ratio: Ratio) -> str:
    """Like `1.234x [1.200, 1.300]`, the brackets being the 95 % interval."""
    return f"{ratio.estimate:.3f}x [{ratio.low:.3f}, {ratio.high:.3f}]"


def speedup_not_reached(what: str, required: float, *, do: str) -> SpeedupNotReached:
    """The error for a speed-up that was required and not measured.

    Args:
        what: the speed-up that was, a sentence.
    """
    return SpeedupNotReached(
        what, expected=f"At least {required:g}x was required, at the lower end of the interval.", do=do
    )
