"""The tolerance within which two outputs of a network count as the same.

It is relative to the spread of the logits, not to their size: adding 1,000 to all of them changes no
prediction, and would hide an error if it were relative to the largest.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["outside_tolerance", "spread"]

_Array = np.ndarray[tuple[Any, ...], np.dtype[Any]]


def spread(wanted: _Array) -> float:
    """Compute the standard deviation of all logits about the mean of their own sample.

    It is not their range, which grows with the number of samples: a test set would then have a larger
    tolerance than the eight golden samples.

    Args:
        wanted: (samples, classes). With one class, the deviation is about the mean of all samples.

    Returns:
        The deviation; 0 for no samples.
    """
    if not wanted.size:
        return 0.0
    logits = wanted.astype(np.float64).reshape(len(wanted), -1)
    about = logits.mean(1, keepdims=True) if logits.shape[1] > 1 else logits.mean()
    return float(np.std(logits - about))


def outside_tolerance(found: _Array, wanted: _Array, *, atol: float, rtol: float) -> tuple[float, bool]:
    """Compare two outputs.

    Args:
        found: (samples, classes).
        wanted: of the same shape.
        atol: absolute tolerance.
        rtol: tolerance as a share of `spread(wanted)`.

    Returns:
        The largest absolute difference, and whether it exceeds atol + rtol * spread(wanted). NaN always does.
    """
    largest = float(np.abs(found.astype(np.float64) - wanted).max(initial=0.0))
    return largest, not largest <= atol + rtol * spread(wanted)
