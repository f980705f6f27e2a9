"""N:M patterns: at most N nonzeros in every M consecutive weights along the reduction axis.

Legend: G groups, M members of one. The reduction axis is the one that the layer sums over (its input
channels); of a convolution every kernel position has groups of its own, of a grouped convolution every group
of channels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_export.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class NMPattern:
    """A cap: at most n nonzeros in every m. 1 <= n < m; fewer nonzeros obey it too. Raises UsageError."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise UsageError(
                f"The pattern {self.n}:{self.m} was asked for.",
                expected="N:M with 1 <= N < M was expected, like 2:4.",
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> float:
        """The largest density that obeys the pattern."""
        return self.n / self.m


def pattern_from_text(text: str) -> NMPattern:
    """`2:4` as a pattern. Raises UsageError for anything else than N:M with 1 <= N < M."""
    found = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", text)
    if found is None:
        raise UsageError(f"{text!r} is not a pattern.", expected="N:M was expected, like 2:4.")
    return NMPattern(n=int(found[1]), m=int(found[2]))


def fits(shape: tuple[int, ...], axis: int, pattern: NMPattern) -> bool:
    """Can a tensor of this shape be divided into groups of M along `axis`?"""
    return shape[axis] > 0 and shape[axis] % pattern.m == 0


def grouped(tensor: Tensor, axis: int, pattern: NMPattern) -> Tensor:
    """The tensor as (G, M): the axis moved last and divided into groups, groups in row-major order.

    A view where the layout allows it, else a copy. Raises ValueError when M does not divide the axis.
    """
    if not fits(tuple(tensor.shape), axis, pattern):
        raise ValueError(
            f"Axis {axis} of shape {tuple(tensor.shape)} has {tensor.shape[axis]} entries; "
            f"{pattern} needs a multiple of {pattern.m}."
        )
    return tensor.movedim(axis, -1).reshape(-1, pattern.m)


def ungrouped(groups_GM: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """The inverse of `grouped`: (G, M) as a contiguous tensor of `shape`."""
    moved = list(shape)
    moved.append(moved.pop(axis))
    return groups_GM.reshape(moved).movedim(-1, axis).contiguous()


def groups_over(tensor: Tensor, axis: int, pattern: NMPattern) -> Tensor:
    """How many groups have more than N nonzeros: int64, shape (). tensor: a mask, or weights.

    NaN is a nonzero. Raises ValueError when M does not divide the axis.
    """
    nonzero = grouped(tensor if tensor.dtype == torch.bool else tensor != 0, axis, pattern)
    return (nonzero.sum(1) > pattern.n).sum()


def obeys(tensor: Tensor, axis: int, pattern: NMPattern) -> bool:
    """Has every group at most N nonzeros? Reads from the device. Raises as `groups_over` does."""
    return not int(groups_over(tensor, axis, pattern))


def largest_per_group(scores: Tensor, axis: int, pattern: NMPattern) -> Tensor:
    """Mark the N largest |scores| of every group; of equal ones those of lower index.

    scores: float, any shape whose axis M divides.  Returns bool, the same shape, exactly N of M True.
    """
    groups = grouped(scores.abs(), axis, pattern)
    order = groups.argsort(dim=1, descending=True, stable=True)[:, : pattern.n]
    chosen = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True)
    return ungrouped(chosen, tuple(scores.shape), axis)
