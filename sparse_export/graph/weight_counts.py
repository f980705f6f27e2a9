"""What is counted in a weight: zeros, groups over 2:4, the patterns that hold, and what 2:4 would keep.

A weight is gone through once, in pieces that stay in the caches, so that no copy of a large one is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from sparse_export.graph.eligibility import GROUP
from sparse_export.graph.stored_tensors import nonzeros
from sparse_export.signature import Array

__all__ = ["WeightCounts", "count_groups_over", "count_weight", "is_all_finite"]

_PIECE = 2**16  # weights looked at together: a quarter of a megabyte as float32
_SIZES = (2, 4, 8, 16)  # M of the patterns that are told
_NO_MAGNITUDE = "cOSUMm"  # kinds of types whose |w| is not summed
_Piece = Array  # (outer, length, inner), contiguous; groups lie along the length


@dataclass(kw_only=True)
class WeightCounts:
    """What was counted in a weight.

    Attributes:
        n_nonzero: -0.0 is zero, NaN is not.
        n_groups_over: groups of four along the reduction axis with more than two nonzeros.
        n_groups: all of them; None where four does not divide what is summed together.
        most: by the size of a group, the largest number of nonzeros in one. A size that does not divide the
            sum, and all larger ones, are missing.
        kept: sum |w| of the two largest of every four, in float64; infinite or NaN where weights are, or
            where they are too large to be summed.
        dropped: of the other two.
        has_sums: are these known? Not where four does not divide the sum, for an empty weight, and for one of
            no real numbers.
    """

    n_nonzero: int = 0
    n_groups_over: int = 0
    n_groups: int | None = None
    most: dict[int, int] = field(default_factory=dict)
    kept: float = 0.0
    dropped: float = 0.0
    has_sums: bool = False

    @property
    def over(self) -> tuple[int, int] | None:
        """Groups that break 2:4, and groups; None where four does not divide the sum."""
        return None if self.n_groups is None else (self.n_groups_over, self.n_groups)

    @property
    def obeys(self) -> tuple[str, ...]:
        """The tightest N:M for each M that divides the sum, but those that follow from a smaller M."""
        found = []
        before = 1  # nonzeros in a group of the size before
        for m, counted in self.most.items():
            implied, before = 2 * before, max(counted, 1)
            if before < min(m, implied):
                found.append(f"{before}:{m}")
        return tuple(found)

    @property
    def is_finite(self) -> bool:
        """Are the sums known, and finite numbers? Then every weight is one."""
        return self.has_sums and math.isfinite(self.kept + self.dropped)

    @property
    def share_kept(self) -> float:
        """The share of the magnitude that 2:4 keeps; 1 where there is none, since nothing is lost."""
        return self.kept / (self.kept + self.dropped) if self.kept + self.dropped else 1.0


def count_weight(values: Array, axis: int, n_reduced: int) -> WeightCounts:
    """Count in a weight what a table of layers tells of it.

    Args:
        values: not changed.
        axis: the reduction axis.
        n_reduced: how many of its entries are summed together; a divisor of its length.
    """
    sizes = [m for m in _SIZES if values.size and n_reduced % m == 0]
    found = WeightCounts(
        n_groups=values.size // GROUP if n_reduced and n_reduced % GROUP == 0 else None,
        most=dict.fromkeys(sizes, 0),
        has_sums=GROUP in sizes and values.dtype.kind not in _NO_MAGNITUDE,
    )
    with np.errstate(all="ignore"):  # NaN and overflow are findings about a weight
        for piece in _pieces(values, axis):
            _count(piece, found)
    return found


def count_groups_over(values: Array, axis: int, n_reduced: int, *, n: int, m: int) -> tuple[int, int] | None:
    """Count the groups of m along an axis that have more than n nonzeros, and all groups.

    Args:
        values: a weight, not changed.
        axis: as in `count_weight`, as is `n_reduced`.
        n: nonzeros that a group may have.
        m: entries of a group.

    Returns:
        Both; None where m does not divide the sum.
    """
    if not n_reduced or n_reduced % m:
        return None
    counts = np.moveaxis(nonzeros(values), axis, -1).reshape(-1, m).sum(axis=1, dtype=np.uint16)
    return int(np.count_nonzero(counts > n)), len(counts)


def is_all_finite(values: Array) -> bool:
    """Is every value a finite number? False may be wrong where the sum of |w| overflows the type.

    Args:
        values: of a float type, not changed.
    """
    with np.errstate(all="ignore"):
        return all(bool(np.isfinite(piece.sum(dtype=_wide(values)))) for piece in _pieces(values, -1))


def _wide(values: Array) -> np.dtype[np.float32] | np.dtype[np.float64]:
    """float32 where it holds every value of the type, else float64."""
    kind, size = values.dtype.kind, values.dtype.itemsize
    is_wide = (kind in "iu" and size > 2) or (kind == "f" and size > 4)
    return np.dtype(np.float64) if is_wide else np.dtype(np.float32)


def _pieces(values: Array, axis: int) -> Iterator[_Piece]:
    """A weight piece by piece; each holds whole groups of the largest size, as far as there are such."""
    if not values.size:
        return
    values = values.reshape(1) if not values.ndim else values
    axis %= values.ndim
    # Entries in the order of memory, whatever the order of the axes.
    order = sorted(range(values.ndim), key=lambda at: (-abs(values.strides[at]), at))
    laid_out, axis = values.transpose(order), order.index(axis)
    if laid_out.flags.c_contiguous:
        yield from _cut(_as_piece(laid_out, axis))
        return
    along = int(np.argmax(laid_out.shape))
    for at in _slices(laid_out.shape[along], laid_out.size, whole_groups=along == axis):
        part = np.ascontiguousarray(laid_out[(*[slice(None)] * along, at)])
        yield from _cut(_as_piece(part, axis))


def _as_piece(values: Array, axis: int) -> _Piece:
    inner = math.prod(values.shape[axis + 1 :])
    if inner == 1:  # rows follow on one another without a gap
        return values.reshape(1, -1, 1)
    return values.reshape(-1, values.shape[axis], inner)


def _slices(length: int, size: int, *, whole_groups: bool) -> Iterator[slice]:
    """Parts of an axis of some length, so that each has `_PIECE` of `size` entries, or little more."""
    step = max(1, _PIECE * length // max(size, 1))
    if whole_groups:
        step = -(-step // _SIZES[-1]) * _SIZES[-1]
    for start in range(0, length, step):
        yield slice(start, start + step)


def _cut(piece: _Piece) -> Iterator[_Piece]:
    """Cut along the first axis that is long enough, until each part is small."""
    if piece.size <= 2 * _PIECE:
        yield piece
        return
    outer, length, _ = piece.shape
    axis = 0 if outer > 1 else 1 if length > _SIZES[-1] else 2
    for at in _slices(piece.shape[axis], piece.size, whole_groups=axis == 1):
        yield from _cut(piece[(*[slice(None)] * axis, at)])


def _count(piece: _Piece, found: WeightCounts) -> None:
    """Add to the counts what there is in one piece."""
    group = max((m for m in found.most if m <= GROUP), default=1)
    parts = _members(piece, group, magnitudes=found.has_sums)
    nonzero = parts if parts.dtype == np.bool_ else parts != 0
    n_nonzero = int(np.count_nonzero(nonzero))
    found.n_nonzero += n_nonzero
    if n_nonzero == nonzero.size:
        found.most = {m: m for m in found.most}
        found.n_groups_over += nonzero.size // GROUP if group == GROUP else 0
    elif found.most:
        _count_groups(nonzero.view(np.uint8), piece.shape, found)
    if found.has_sums:
        _add_sums(parts, found)


def _members(piece: _Piece, group: int, *, magnitudes: bool) -> Array:
    """The first entries of all groups, then the second, ..., each a row (group, number of groups).

    As |w|, or as bool: which are not zero.
    """
    outer, length, inner = piece.shape
    members = piece.reshape(outer, length // group, group, inner).transpose(2, 0, 1, 3)
    if not magnitudes:
        return np.ascontiguousarray(nonzeros(members)).reshape(group, -1)
    rows = np.empty(members.shape, _wide(piece))
    np.copyto(rows, members, casting="unsafe")
    flat = rows.reshape(group, -1)
    return np.abs(flat, out=flat)


def _count_groups(nonzero: Array, shape: tuple[int, ...], found: WeightCounts) -> None:
    """Count nonzeros in groups of each size. nonzero: 0 or 1, (members of a group, groups)."""
    counts = nonzero
    for m in found.most:
        if m <= GROUP:
            counts = counts[0::2] + counts[1::2]
        elif all(found.most[size] == size for size in found.most if size >= m):
            break  # nothing new can be found
        else:
            by_axis = counts.reshape(shape[0], -1, shape[2])
            counts = by_axis[:, 0::2] + by_axis[:, 1::2]
        found.most[m] = max(found.most[m], int(counts.max()))
        if m == GROUP:
            found.n_groups_over += int(np.count_nonzero(counts > GROUP // 2))


def _add_sums(parts: Array, found: WeightCounts) -> None:
    """Add up the two largest of every four, and the other two. parts: |w|, (4, groups)."""
    a, b, c, d = parts
    high, low = np.maximum(a, b), np.minimum(a, b)
    other_high, other_low = np.maximum(c, d), np.minimum(c, d)
    middle, other_middle = np.minimum(high, other_high), np.maximum(low, other_low)
    np.maximum(high, other_high, out=a)
    np.maximum(middle, other_middle, out=b)
    np.minimum(middle, other_middle, out=c)
    np.minimum(low, other_low, out=d)
    found.kept += float(parts[:2].sum(dtype=np.float64))
    found.dropped += float(parts[2:].sum(dtype=np.float64))
