"""Targets of several samples as one array, where they are numbers of one shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["number_array", "stacked"]


def stacked(targets: Sequence[Any]) -> Any:
    """Stack targets.

    Args:
        targets: one a sample, at least one.

    Returns:
        An array with the samples first where all are numbers, or arrays, of one shape; else what was given.
    """
    arrays = [number_array(one) for one in targets]
    shapes = {one.shape if isinstance(one, np.ndarray) else None for one in arrays}
    return np.stack(arrays) if len(shapes) == 1 and None not in shapes else targets


def number_array(value: Any) -> Any:
    """Make an array of a number.

    Args:
        value: anything.

    Returns:
        An array; what is no number and no array, as it is.
    """
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, bool | int | float | np.generic):
        return np.asarray(value)
    return value
