"""Which task targets look like, in words."""

from __future__ import annotations

import numpy as np

from sparse_export.signature import Array

__all__ = ["class_numbers_text", "fitting", "not_finite_text"]


def fitting(targets: Array) -> str:
    """Name the task that targets look like.

    Args:
        targets: of a set.

    Returns:
        The end of a sentence; empty where no task is known.
    """
    is_binary = targets.dtype.kind in "biuf" and np.isin(targets, (0, 1)).all()
    flat = targets.ndim == 1 or (targets.ndim == 2 and targets.shape[1] == 1)
    if flat and is_binary and targets.dtype.kind in "bf":
        name = "binary"
    elif targets.ndim == 2 and is_binary and (targets.sum(axis=1) != 1).any():
        name = "multilabel"
    elif targets.ndim == 3 and targets.dtype.kind in "iu":
        name = "segmentation"
    elif targets.ndim == 1 and targets.dtype.kind in "iu" and len(targets) and targets.min() >= 0:
        name = "classification"
    elif targets.ndim <= 2 and targets.dtype.kind == "f" and np.isfinite(targets).all():
        name = "regression"
    else:
        return ""
    return f". They fit the task {name}"


def class_numbers_text(targets: Array, n_outputs: int) -> str:
    """Name the task classification where targets are class numbers of a network.

    Args:
        targets: of a set.
        n_outputs: of the network.

    Returns:
        As `fitting`.
    """
    is_whole = targets.ndim == 1 and targets.dtype.kind in "iu" and len(targets) > 0
    if n_outputs > 1 and is_whole and targets.min() >= 0 and targets.max() < n_outputs:
        return ". They fit the task classification"
    return ""


def not_finite_text(targets: Array) -> str | None:
    """Say how many targets are NaN or infinite, and the first.

    Args:
        targets: of a set.

    Returns:
        The end of a sentence; None where none is.
    """
    wrong = np.argwhere(~np.isfinite(targets))
    if not len(wrong):
        return None
    first = int(wrong[0][0]) if targets.ndim == 1 else tuple(map(int, wrong[0]))
    return f"hold {len(wrong)} that are NaN or infinite, the first at {first}"
