"""When two answers of a network count as the same.

Logits are held together by how far they lie apart among themselves, not by how large they are: adding 1,000 to all of
them changes no answer, and would let an error pass that is relative to the largest.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["outside_tolerance", "spread"]

_Array = np.ndarray[tuple[Any, ...], np.dtype[Any]]


def spread(wanted: _Array) -> float:
    """The standard deviation of all logits about the mean of their own sample; 0 of none.

    wanted: (samples, classes). Where there is but one logit a sample, about the mean of all.

    Not their range, which grows with the number of samples, so that a test set would be held to less than eight
    golden samples.
    """
    if not wanted.size:
        return 0.0
    logits = wanted.astype(np.float64).reshape(len(wanted), -1)
    about = logits.mean(1, keepdims=True) if logits.shape[1] > 1 else logits.mean()
    return float(np.std(logits - about))


def outside_tolerance(found: _Array, wanted: _Array, *, atol: float, rtol: float) -> tuple[float, bool]:
    """Largest absolute difference, and whether it exceeds atol + rtol * spread(wanted). NaN always does."""
    largest = float(np.abs(found.astype(np.float64) - wanted).max(initial=0.0))
    return largest, not largest <= atol + rtol * spread(wanted)
