"""Layers of a network pruned to an N:M pattern by what was learnt of their inputs.

The formulas are functions of matrices (`weights.py`); here a convolution becomes one, a grouped one
several.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from sparse_export.errors import UnknownNameError
from sparse_export.oneshot.unfolding import InputStatistics
from sparse_export.oneshot.weights import (
    Pruned,
    by_activation,
    by_magnitude,
    by_reconstruction,
    columns_from_weight,
    row_errors,
    weight_from_columns,
)
from sparse_export.sparsity.caps import Cap
from sparse_export.sparsity.pattern import NMPattern, largest_per_group

Method = Literal["magnitude", "activation", "reconstruction"]


@dataclass(frozen=True, kw_only=True)
class PrunedWeight:
    """A weight after pruning. error: ‖X (W - W')‖ / ‖X W‖ on the calibration data, None without any."""

    weight: Tensor
    mask: Tensor
    error: float | None


def require_method(name: str) -> Method:
    """The method of that name. Raises UnknownNameError."""
    for method in get_args(Method):
        if name == method:
            return method  # type: ignore[no-any-return]  # get_args forgets what Method lists
    raise UnknownNameError("method", name, get_args(Method))


def prune_weight(
    weight: Tensor,
    cap: Cap,
    method: Method,
    statistics: InputStatistics | None = None,
    *,
    allowed: Tensor | None = None,
) -> PrunedWeight:
    """Bring a weight (O, I, …) under its cap.

    weight: on the CPU.  statistics: of its inputs; Gram matrices for `reconstruction`, any for `activation`;
    without them only `magnitude` is possible, and there is no error.  allowed: bool, False where a zero must
    stay.
    """
    if statistics is None:
        if method != "magnitude":
            raise ValueError(f"{method} needs statistics of the layer's inputs")
        mask = largest_per_group(weight if allowed is None else weight * allowed, cap.axis, cap.pattern)
        mask = mask if allowed is None else mask & allowed
        return PrunedWeight(weight=torch.where(mask, weight, 0), mask=mask, error=None)
    n_groups = len(statistics.squares)
    columns = columns_from_weight(weight).chunk(n_groups)
    allowed_in = [None] * n_groups if allowed is None else columns_from_weight(allowed).chunk(n_groups)
    parts, error, whole = [], 0.0, 0.0
    for group, (block, may) in enumerate(zip(columns, allowed_in, strict=True)):
        gram = None if statistics.gram is None else statistics.gram[group]
        part = pruned_block(block, cap.pattern, method, statistics.squares[group], gram, may)
        parts.append(part)
        if gram is not None:
            error += float(row_errors(block, part.weight, gram).sum())
            whole += float(row_errors(block, torch.zeros_like(block), gram).sum())
    shape = tuple(weight.shape)
    return PrunedWeight(
        weight=weight_from_columns(torch.cat([part.weight for part in parts]), shape),
        mask=weight_from_columns(torch.cat([part.mask for part in parts]), shape),
        error=None if statistics.gram is None else math.sqrt(error / whole) if whole else 0.0,
    )


def pruned_block(
    block: Tensor,
    pattern: NMPattern,
    method: Method,
    squares: Tensor,
    gram: Tensor | None,
    allowed: Tensor | None,
    cross: Tensor | None = None,
    damping: float = 0.01,
) -> Pruned:
    """Bring a matrix (O, K) under a pattern.

    Args:
        block: of one group of channels.
        pattern: N:M.
        method: how weights are chosen.
        squares: of the inputs, (K,).
        gram: of the inputs, (K, K), for `reconstruction`.
        allowed: bool, False where a zero must stay.
        cross: wanted outputs times inputs, (O, K), for `reconstruction`; None to want what the whole matrix
            gives.
        damping: as of `by_reconstruction`.
    """
    if method == "activation":
        return by_activation(block, squares, pattern, allowed=allowed)
    if method == "reconstruction" and gram is not None:
        return by_reconstruction(block, gram, pattern, allowed=allowed, cross=cross, damping=damping)
    if method == "magnitude":
        return by_magnitude(block, pattern, allowed=allowed)
    raise ValueError(f"{method} needs Gram matrices of the layer's inputs")


def worth_of_weight(weight: Tensor, statistics: InputStatistics) -> Tensor:
    """|w| · ‖x‖ for every entry of a weight (O, I, …), of the weight's type: what a search for orders is to
    keep.
    """
    norms = statistics.squares.sqrt()  # (groups, K)
    norms_OK = norms.repeat_interleave(weight.shape[0] // len(norms), dim=0)
    return (weight.abs() * weight_from_columns(norms_OK, tuple(weight.shape))).to(weight.dtype)
