"""When two answers of a network count as the same."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["outside_tolerance"]

_Array = np.ndarray[tuple[Any, ...], np.dtype[Any]]


def outside_tolerance(found: _Array, wanted: _Array, *, atol: float, rtol: float) -> tuple[float, bool]:
    """Largest absolute difference, and whether it exceeds atol + rtol * max|wanted|. NaN always does."""
    largest = float(np.abs(found.astype(np.float64) - wanted).max(initial=0.0))
    return largest, not largest <= atol + rtol * float(np.abs(wanted).max(initial=0.0))
