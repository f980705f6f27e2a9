"""DSR, dynamic sparse reparameterization: one threshold prunes all layers, and survivors share growth.

Prune: the weights of all layers below one threshold, which starts at 0.001 and follows the prune rate from
update to update, see `sparse_export.sparsity.prune.next_threshold`. Redistribution: by the number of weights
that pruning left in a layer. Growth: positions drawn at random; a grown weight starts without momentum.
Schedule: masks move to the end.

Source: Mostafa & Wang 2019, "Parameter efficient training of deep convolutional neural networks by dynamic
sparse reparameterization", algorithm 1. On purpose different: the number of active weights is exact, and the
prune rate and its schedule are the recipe's.
"""

from __future__ import annotations

from sparse_export.train.methods.method import Method
from sparse_export.train.methods.sparse_evolution import RANDOM
from sparse_export.train.methods.swap_weights import swap_weights

__all__ = ["DSR"]

DSR = Method(
    name="dsr",
    update=swap_weights,
    prune="threshold",
    redistribution="survivors",
    growth=RANDOM,
    forgets=True,
    freeze=1.0,
    final_prune_rate=0.005,
)
