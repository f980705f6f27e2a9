"""What the layers of a graph would keep if they were made 2:4, and what hardware could do with them then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparse_export.formats.layers import Eligible, GraphLayer, Reason
from sparse_export.graph.eligibility import MISSING, could_be_used

__all__ = ["IfPruned", "LayerIfPruned", "totals_if_pruned"]


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
