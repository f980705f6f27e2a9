"""Which weights are born: the inactive positions of largest score."""

from __future__ import annotations

from torch import Tensor

from sparse_export.sparsity.select import largest


def grown(scores: Tensor, inactive: Tensor, n_grown: Tensor) -> Tensor:
    """Mark the `n_grown` inactive positions of largest |score|; on ties the lower index.

    scores: float, any shape.  inactive: bool, the same shape.  n_grown: int64, shape ().
    Returns bool.
    """
    return largest(scores, inactive, n_grown)
