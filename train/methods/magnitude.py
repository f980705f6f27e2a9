"""Gradual magnitude pruning: from dense to sparse during training, nothing is grown.

Prune: the smallest |weight| of all layers together (or of each layer by its share, with `prune =
"magnitude"`), so many that the density falls as final + (1 - final) * (1 - progress)^3. Schedule: it arrives
at three quarters of the training, and masks stand still from there.

Source: Zhu & Gupta 2017, "To prune, or not to prune: exploring the efficacy of pruning for model
compression", equation 1.
"""

from __future__ import annotations

from sparse_export.sparsity import MaskUpdate, layer_counts, prune_masks
from sparse_export.train.methods.method import RATE_KEYS, START_KEYS, Accepts, Method, Moment

__all__ = ["MAGNITUDE"]


def _update(method: Method, at: Moment) -> MaskUpdate:
    """Keep the largest weights, as many as are wanted."""
    shapes = {name: tuple(value.shape) for name, value in at.parameters.items()}
    return prune_masks(
        at.magnitudes,
        at.masks,
        n_active=at.n_wanted,
        prune=method.prune,
        counts=layer_counts(shapes, at.n_wanted / at.n_weights, at.start),
    )


MAGNITUDE = Method(
    name="magnitude",
    update=_update,
    prune="global-magnitude",
    start_density=1.0,
    falls_until=1.0,  # of the part in which masks move
    freeze=0.75,
    accepts=Accepts(
        prunes=("magnitude", "global-magnitude"),
        redistributions=(),
        growths=(),
        falls=False,
        narrows=False,
        pattern="no",
        transposable=False,
        products=("dense", "2:4"),
        unread=("decay", *RATE_KEYS, *START_KEYS),
    ),
)
