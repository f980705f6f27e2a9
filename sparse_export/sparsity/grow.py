"""Which weights are born: the inactive positions of largest score."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sparse_export.sparsity.select import largest_in_each


def grown(scores: Mapping[str, Tensor], inactive: Mapping[str, Tensor], n_grown: Tensor) -> dict[str, Tensor]:
    """Mark the `n_grown` inactive positions of largest |score| in every layer; on ties the lower index.

    scores: float, inactive: bool, by name in one order, shapes alike.  n_grown: int64 (L,).  Returns bool by
    name.
    """
    return largest_in_each(scores, inactive, n_grown)
