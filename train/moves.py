"""Which weights a mask update prunes and grows, by the method of a training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparse_export.sparsity import (
    Distribution,
    MaskUpdate,
    gradual_density,
    layer_counts,
    prune_masks,
    update_masks,
)
from sparse_export.sparsity.prune import FIRST_THRESHOLD
from sparse_export.sparsity.update import joined
from sparse_export.train.growth import gradient_scores, random_scores
from sparse_export.train.masked_layers import MaskedLayers
from sparse_export.train.methods import Method
from sparse_export.train.momentum import growth_scores
from sparse_export.train.transposable import only, swapped_both_ways

__all__ = ["n_active_gradually", "pruned_gradually", "swapped"]


def swapped(
    layers: MaskedLayers,
    masks: Mapping[str, Tensor],
    method: Method,
    optimizer: Optimizer,
    *,
    prune_rate: float,
    n: int,
    is_cut: bool,
    threshold: Tensor | None,
    seed: int,
    step: int,
) -> MaskUpdate:
    """As many weights grown as pruned, but where a cap has become smaller.

    n: the pattern's cap.  is_cut: it has just become smaller.  threshold: of the update before, where pruning goes by
    one.  seed, step: of random growth.
    """
    weights = layers.weights()
    grown_by = _grown_by(layers, method, seed, step)
    scores = (
        grown_by if grown_by and not method.reads_momentum else growth_scores(optimizer, layers.parameters)
    )
    if method.prune == "threshold" and threshold is None:
        device = next(iter(masks.values())).device
        threshold = torch.full((), FIRST_THRESHOLD, dtype=torch.float64, device=device)
    tiled = layers.both_ways if layers.is_down(n) else ()
    others = [name for name in masks if name not in tiled]
    updates: list[MaskUpdate] = []
    if tiled:
        wanted = scores if grown_by is None else grown_by
        updates.append(swapped_both_ways(weights, wanted, masks, tiled, prune_rate=prune_rate, is_cut=is_cut))
    if others:
        n_tiled = sum(masks[name].numel() // 2 for name in tiled)
        updates.append(
            update_masks(
                only(weights, others),
                only(scores, others),
                only(masks, others),
                prune_rate=prune_rate,
                redistribution=method.redistribution,
                prune=method.prune,
                threshold=threshold,
                growth_scores=None if grown_by is None else only(grown_by, others),
                caps={name: cap for name, cap in layers.caps(n).items() if name in others},
                n_active=layers.n_active(n) - n_tiled,
            )
        )
    return updates[0] if len(updates) == 1 else joined(updates, list(masks))


def _grown_by(layers: MaskedLayers, method: Method, seed: int, step: int) -> dict[str, Tensor] | None:
    """What growth goes by, where that is not momentum."""
    if method.growth == "random":
        return random_scores(layers.parameters, seed, step)
    if method.growth == "gradient":
        return gradient_scores(layers.parameters)
    return None


def n_active_gradually(n_weights: int, n_before: int, *, step: int, end: int, n_last: int) -> int:
    """Active weights of gradual pruning after `step` steps: never more than before, n_last of them at step `end`."""
    density = gradual_density(step, end, n_last / n_weights)
    return min(n_before, max(round(density * n_weights), n_last))


def pruned_gradually(
    layers: MaskedLayers,
    masks: Mapping[str, Tensor],
    method: Method,
    *,
    n_active: int,
    start: Distribution,
) -> MaskUpdate:
    """The largest weights, n_active of them. start: how they are spread, where each layer is pruned by itself."""
    return prune_masks(
        layers.weights(),
        masks,
        n_active=n_active,
        prune=method.prune,
        counts=layer_counts(layers.shapes, n_active / layers.n_weights, start),
    )
