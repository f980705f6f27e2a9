"""Gradual magnitude pruning: from dense to sparse during training, nothing is grown.

Prune: the smallest |weight| of all layers together (or of each layer by its share, with `prune =
"magnitude"`), so many that the density falls as final + (1 - final) * (1 - progress)^3. Schedule: it arrives
at three quarters of the training, and masks stand still from there.

Source: Zhu & Gupta 2017, "To prune, or not to prune: exploring the efficacy of pruning for model
compression", equation 1.
"""

from __future__ import annotations

from sparse_export.sparsity import MaskUpdate, gradual_density, layer_counts, prune_masks
from sparse_export.train.methods.method import RATE_KEYS, START_KEYS, Accepts, Method, Moment

__all__ = ["MAGNITUDE", "n_active_gradually"]


def n_active_gradually(n_weights: int, n_before: int, *, step: int, end: int, n_last: int) -> int:
    """Active weights of gradual pruning after `step` steps.

    Args:
        n_weights: all weights.
        n_before: active ones before.
        step: optimizer steps done.
        end: the step at which n_last is reached.
        n_last: active weights in the end.

    Returns:
        Never more than n_before, and never fewer than n_last.
    """
    density = gradual_density(step, end, n_last / n_weights)
    return min(n_before, max(round(density * n_weights), n_last))


def _n_weights(at: Moment) -> int:
    return sum(value.numel() for value in at.parameters.values())


def _n_active(at: Moment) -> int:
    return n_active_gradually(_n_weights(at), at.n_before, step=at.step, end=at.end, n_last=at.n_wanted)


def _update(method: Method, at: Moment) -> MaskUpdate:
    """Keep the largest weights, as many as the moment has."""
    n_active = _n_active(at)
    shapes = {name: tuple(value.shape) for name, value in at.parameters.items()}
    return prune_masks(
        at.weights(),
        at.masks,
        n_active=n_active,
        prune=method.prune,
        counts=layer_counts(shapes, n_active / _n_weights(at), at.start),
    )


MAGNITUDE = Method(
    name="magnitude",
    update=_update,
    n_active=_n_active,
    prune="global-magnitude",
    start="dense",
    freeze=0.75,
    accepts=Accepts(
        prunes=("magnitude", "global-magnitude"),
        redistributions=(),
        growths=(),
        pattern="no",
        transposable=False,
        products=("dense", "2:4"),
        unread=("decay", *RATE_KEYS, *START_KEYS),
    ),
)
