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
    """The standard deviation of all logits of all samples; 0 of none.

    Not their range, which grows with the number of samples, so that a test set would be held to less than eight
    golden samples.
    """
    return float(np.std(wanted.astype(np.float64))) if wanted.size else 0.0


def outside_tolerance(found: _Array, wanted: _Array, *, atol: float, rtol: float) -> tuple[float, bool]:
    """Largest absolute difference, and whether it exceeds atol + rtol * spread(wanted). NaN always does."""
    largest = float(np.abs(found.astype(np.float64) - wanted).max(initial=0.0))
    return largest, not largest <= atol + rtol * spread(wanted)
