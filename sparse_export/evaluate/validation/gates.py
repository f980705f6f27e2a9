"""Whether parity and accuracy are within their bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparse_export.building.golden import batch_sizes
from sparse_export.errors import GateFailed

if TYPE_CHECKING:
    from sparse_export.evaluate.validation.result import AgainstDense, Validation

__all__ = ["check_gates", "failures"]


def check_gates(validation: Validation) -> None:
    """Raise GateFailed, with the figures, when parity or a drop in accuracy is not within its bounds."""
    failed = failures(validation)
    if failed:
        raise GateFailed(
            f"{validation.bundle}: {'; '.join(failed)}.",
            expected="Every gate was expected to hold.",
            do="Do not ship this bundle before the cause is known.",
        )


def failures(validation: Validation) -> list[str]:
    """What is not within its bounds, in words."""
    failed = []
    checks = [("the golden pair", validation.golden), ("PyTorch", validation.parity)]
    for one in validation.runtimes:
        checks += [
            (f"the golden pair on {one.name}", one.golden),
            (f"onnxruntime-cpu on {one.name}", one.parity),
        ]
    for label, parity in checks:
        if parity is not None and not parity.ok:
            failed.append(
                f"the logits differ from {label} by {parity.max_abs_difference:.3g}, more than "
                f"{validation.atol:g} + {validation.rtol:g} * the logits' spread"
            )
    failed += _at_some_sizes(validation)
    if validation.max_drop is None:
        return failed
    failed += _lost("", validation.drop_points, validation.against, validation.max_drop)
    for one in validation.runtimes:
        failed += _lost(f" on {one.name}", one.drop_points, one.against, validation.max_drop)
    return failed


def _at_some_sizes(validation: Validation) -> list[str]:
    """What is to be said of batch sizes at which the logits are not PyTorch's."""
    wrong = [one.batch for one in validation.batches if not one.ok]
    agreeing = [one.batch for one in validation.batches if one.ok]
    if not wrong:
        return []
    others = f" and agree at batch {batch_sizes(agreeing)}" if agreeing else ""
    return [f"the logits differ from PyTorch at batch {batch_sizes(wrong)}{others}"]


def _lost(where: str, drop: float | None, against: AgainstDense | None, allowed: float) -> list[str]:
    """What is to be said of accuracy that was lost. where: on which runtime, in words."""
    failed = []
    if drop is not None and _exceeds(drop, allowed):
        failed.append(f"accuracy{where} is {drop:.3f} points below the recorded one, more than {allowed:g}")
    if against is not None and _exceeds(-against.points, allowed):
        failed.append(
            f"accuracy{where} is {-against.points:.3f} points below the dense bundle's, more than "
            f"{allowed:g} (95 % interval of sparse minus dense {against.low:+.3f} to {against.high:+.3f})"
        )
    return failed


def _exceeds(lost: float, allowed: float) -> bool:
    """Is more lost than allowed, by more than rounding of the percentages?"""
    return lost > allowed + 1e-9
