"""What a ratio of dense to sparse times may be said to show, and why, in sentences."""

from __future__ import annotations

from sparse_export.instruments.outcome import Outcome, doubts, outcome_of
from sparse_export.instruments.statistics import Ratio, resolution

__all__ = ["judge"]


def judge(
    *,
    batch: int,
    ratio: Ratio,
    control: Ratio,
    same_shapes: bool,
    has_zeros: bool,
    steady: bool,
    share: float | None = None,
    on_sparse_kernels: str | None = None,
    precisions: tuple[str, str] = ("fp32", "fp32"),
) -> tuple[Outcome, str]:
    """The outcome, and the sentences that say it and why, of a ratio dense / sparse and its A/A control.

    Either direction is claimed only when the whole interval of the ratio lies beyond 1 and beyond the
    farthest that the control's interval reaches from 1.  share: parameters of the sparse graph / those of the
    dense one where dead channels were taken out, else None.  on_sparse_kernels: of a runtime that has
    kernels for 2:4, what it tells of them, else None.  precisions: of the dense and of the sparse graph; where they
    differ, nothing is said to come from sparsity.
    """
    floor = resolution(control)
    outcome = outcome_of(ratio, floor)
    parts = [_headline(batch, outcome, ratio, floor)]
    why = _why(
        outcome,
        same_shapes=same_shapes,
        has_zeros=has_zeros,
        on_sparse_kernels=on_sparse_kernels,
        precisions=precisions,
    )
    if why is not None:
        parts.append(why)
    if share is not None and not same_shapes:
        parts.append(
            f"Dead channels were taken out of the sparse graph: it has {share:.3f} of the dense one's parameters"
            f"{', and zeros among them are still multiplied' if has_zeros else ''}."
        )
    return outcome, " ".join([*parts, *doubts(control, steady=steady)])


def _headline(batch: int, outcome: Outcome, ratio: Ratio, floor: float) -> str:
    resolved = f"two copies of the dense file differ here by up to {100 * (floor - 1):.1f} %"
    interval = f"[{ratio.low:.3f}, {ratio.high:.3f}]"
    if outcome == "speed-up":
        return f"Batch {batch}: speed-up of {ratio.estimate:.3f}x {interval}; {resolved}."
    if outcome == "slow-down":
        slower, low, high = 1 / ratio.estimate, 1 / ratio.high, 1 / ratio.low
        return f"Batch {batch}: slow-down, sparse takes {slower:.3f}x as long [{low:.3f}, {high:.3f}]; {resolved}."
    return f"Batch {batch}: no speed-up; dense / sparse is {ratio} and {resolved}."


def _why(
    outcome: Outcome,
    *,
    same_shapes: bool,
    has_zeros: bool,
    on_sparse_kernels: str | None,
    precisions: tuple[str, str],
) -> str | None:
    """What the graphs let say of the outcome; None of a speed-up of a graph of other shapes, which needs no reason."""
    if precisions[0] != precisions[1]:
        return (
            f"The dense graph computes in {precisions[0]}, the sparse one in {precisions[1]}: the ratio is of both changes "
            "together, and says nothing of sparsity alone. Build both in one precision to know."
        )
    if not same_shapes:
        if outcome == "speed-up":
            return None
        return "The graphs differ in shape, yet the difference in work does not show as a gain."
    if on_sparse_kernels is not None:
        return f"Both graphs have the same shapes. The runtime has kernels for 2:4: {on_sparse_kernels}."
    if outcome == "speed-up":
        return "Both graphs have the same shapes, so this does not come from skipped zeros."
    if has_zeros:
        return (
            "Both graphs have the same shapes: onnxruntime multiplies a zero like any other weight, also where "
            "a packed file stores none, so zeros do not make it faster."
        )
    return "Both graphs have the same shapes and hold no zeros to skip."
