"""What the layers of a graph would keep if they were made 2:4, and what hardware could do with them then."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sparse_export.formats.layers import Eligible, GraphLayer, Reason
from sparse_export.graph.eligibility import GROUP, MISSING, could_be_used

if TYPE_CHECKING:  # it loads onnx, which showing the result does not need
    from sparse_export.graph.constants import Array

__all__ = ["IfPruned", "LayerIfPruned", "is_finite", "kept_and_dropped", "share_kept", "totals_if_pruned"]

_PIECE = 2**16  # weights looked at together, so that no copy of a large weight is made, and caches hold them


@dataclass(frozen=True, kw_only=True)
class LayerIfPruned(GraphLayer):
    """A layer as it is, and what would become of it with the best 2:4 mask.

    It extends `GraphLayer`, which bundles hold as it is, for those who look at a graph.

    Attributes:
        would_keep: share of sum |w| in the two largest of every four along the reduction axis, 0 to 1; 1 for
            a weight of zeros; None where it cannot be known or made 2:4, for which `reasons_if_pruned` says
            why.
        magnitude: sum |w|; None likewise.
        eligible_if_pruned: could hardware that knows 2:4 use the zeros, were the layer 2:4?
        reasons_if_pruned: why not, what is missing, or what there is to know.
    """

    would_keep: float | None = None
    magnitude: float | None = None
    eligible_if_pruned: Eligible = "unproven"
    reasons_if_pruned: tuple[Reason, ...] = ()

    @property
    def could_be_24(self) -> bool:
        """Can it be made 2:4, and could hardware use that once what is missing is mended?"""
        return self.would_keep is not None and could_be_used(self.reasons_if_pruned)


@dataclass(frozen=True, kw_only=True)
class IfPruned:
    """The layers that could be 2:4, together. A weight that two layers share counts with each.

    Attributes:
        n_layers: that could be 2:4 and be of use to hardware, with what is missing mended.
        n_unproven: of these, where only a measurement tells whether hardware could use it.
        n_small: of these, with fewer than 256 inputs or outputs.
        macs_share: of all multiply-accumulates, 0 to 1; None where some are not known, or there are none.
        weights_share: of the known weights of all layers, 0 to 1; None where there are none.
        would_keep: share of their sum |w| that 2:4 would keep, 0 to 1; None where there is no such layer.
        missing: what some of them lack, in words.
    """

    n_layers: int
    n_unproven: int
    n_small: int
    macs_share: float | None
    weights_share: float | None
    would_keep: float | None
    missing: tuple[str, ...]


def totals_if_pruned(layers: Sequence[LayerIfPruned]) -> IfPruned:
    """Sum up the layers that could be 2:4."""
    could = [layer for layer in layers if layer.could_be_24]
    codes = [{reason.code for reason in layer.reasons_if_pruned} for layer in could]
    macs = [layer.macs for layer in layers if layer.macs is not None]
    largest = max((layer.magnitude or 0.0 for layer in could), default=0.0) or 1.0
    # Relative to the largest, so that float64 holds the sum whatever it holds of each.
    parts = [(layer.would_keep or 0.0, (layer.magnitude or 0.0) / largest) for layer in could]
    magnitude = sum(part for _, part in parts)
    kept = sum(share * part for share, part in parts)
    return IfPruned(
        n_layers=len(could),
        n_unproven=sum(layer.eligible_if_pruned == "unproven" for layer in could),
        n_small=sum("small" in found for found in codes),
        macs_share=_share(sum(layer.macs or 0 for layer in could), sum(macs))
        if len(macs) == len(layers)
        else None,
        weights_share=_share(
            sum(layer.n_weights for layer in could), sum(layer.n_weights for layer in layers)
        ),
        would_keep=min(kept / magnitude, 1.0) if magnitude else 1.0 if could else None,
        missing=tuple(dict.fromkeys(text for code, text in MISSING.items() if any(code in f for f in codes))),
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def share_kept(kept: float, dropped: float) -> float:
    """The share of a magnitude that is kept; 1 where there is none, since nothing is lost."""
    return kept / (kept + dropped) if kept + dropped else 1.0


def kept_and_dropped(values: Array, axis: int, n_reduced: int) -> tuple[float, float] | None:
    """Sum |w| of the two largest of every four along an axis, and of the other two.

    Args:
        values: a weight, not changed.
        axis: its reduction axis.
        n_reduced: how many of its entries are summed together; a divisor of its length.

    Returns:
        The two sums, taken in float64; infinite or NaN where weights are, or where they are too large to be
        summed. None where four does not divide the sum, and for a weight that is empty or of no numbers.
    """
    if not values.size or n_reduced % GROUP or values.dtype.kind in "cOSUMm":
        return None
    kept = dropped = 0.0
    with np.errstate(all="ignore"):  # NaN and overflow are findings about a weight
        for a, b, c, d in _pieces(np.moveaxis(values, axis, 0)):
            high, low = np.maximum(a, b), np.minimum(a, b)
            other_high, other_low = np.maximum(c, d), np.minimum(c, d)
            first, rest_high = np.maximum(high, other_high), np.minimum(high, other_high)
            rest_low, last = np.maximum(low, other_low), np.minimum(low, other_low)
            second, third = np.maximum(rest_high, rest_low), np.minimum(rest_high, rest_low)
            kept += float(first.sum(dtype=np.float64)) + float(second.sum(dtype=np.float64))
            dropped += float(third.sum(dtype=np.float64)) + float(last.sum(dtype=np.float64))
    return kept, dropped


def _pieces(values: Array) -> Iterator[list[Array]]:
    """|w| of a few groups after the other, as four arrays: the first, second, third and fourth of each.

    In float32 where that holds every value of the type, else in float64. Groups lie along axis 0.
    """
    wide = (values.dtype.kind in "iu" and values.dtype.itemsize > 2) or values.dtype == np.float64
    dtype = np.float64 if wide else np.float32
    fours = [values[first::GROUP] for first in range(GROUP)]  # views
    shape = fours[0].shape
    along = int(np.argmax(shape))
    step = max(1, _PIECE * shape[along] // values.size)
    for start in range(0, shape[along], step):
        at = (*[slice(None)] * along, slice(start, start + step))
        yield [np.abs(np.ascontiguousarray(member[at], dtype=dtype)) for member in fours]


def is_finite(sums: tuple[float, float]) -> bool:
    """Can a share be told from the sums of `kept_and_dropped`?"""
    return math.isfinite(sums[0] + sums[1])
