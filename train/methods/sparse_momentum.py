"""Sparse momentum, this project's own method: layers get weights, and weights are grown, by their momentum.

Prune: the smallest |weight| of each layer, by the prune rate. Redistribution: a layer's share of what was
pruned follows the mean |momentum| of its active weights. Growth: the inactive weights of largest |momentum|,
which goes on for them while they are inactive. Schedule: masks move to the end, the prune rate falls along a
cosine to 0.005.

Source: Dettmers & Zettlemoyer 2019, "Sparse networks from scratch: faster training without losing
performance", algorithm 1. `sparse_export.sparsity.update_masks` documents where ours differs from its
implementation.
"""

from __future__ import annotations

from torch import Tensor

from sparse_export.train.methods.method import Growth, Method, Moment
from sparse_export.train.methods.swap_weights import swap_weights

__all__ = ["MOMENTUM", "SPARSE_MOMENTUM"]


def _scores(at: Moment) -> dict[str, Tensor]:
    return at.momentum()


MOMENTUM = Growth(name="momentum", scores=_scores, reads_momentum=True)

SPARSE_MOMENTUM = Method(
    name="sparse-momentum",
    update=swap_weights,
    prune="magnitude",
    redistribution="momentum",
    growth=MOMENTUM,
    freeze=1.0,
    final_prune_rate=0.005,
)
