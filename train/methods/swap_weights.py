"""One update that prunes and grows: what the methods that move weights have in common.

Where the density falls, as in `granet`, it is brought down first: the smallest magnitudes of all layers
together are pruned for good. What is left is then pruned and grown by the method's own rules. Where channels
become fewer, the weights of those that go are pruned before all that, and none are grown there.
"""

from __future__ import annotations

import torch

from sparse_export.sparsity import MaskUpdate, prune_masks, update_masks
from sparse_export.sparsity.prune import FIRST_THRESHOLD
from sparse_export.sparsity.update import joined
from sparse_export.train.methods.method import Method, Moment
from sparse_export.train.transposable import only, swap_transposable

__all__ = ["swap_weights"]


def swap_weights(method: Method, at: Moment) -> MaskUpdate:
    """Prune, and grow as many by the method's three answers.

    Fewer are grown where a pattern's cap has become smaller, or the density falls.

    Args:
        method: its prune, redistribution and growth.
        at: where the training stands.

    Returns:
        The update of all layers together.

    Raises:
        UsageError: the optimizer or the gradients lack what growth goes by.
        ValueError: weights or scores are not finite, see `sparse_export.sparsity.update_masks`.
    """
    weights, masks, n_before = at.magnitudes, at.masks, at.n_before
    if at.places is not None:
        masks = {name: mask & at.places[name] for name, mask in masks.items()}
        n_before = int(torch.stack([torch.count_nonzero(mask) for mask in masks.values()]).sum())
    if not at.caps and at.n_wanted < n_before:
        masks = prune_masks(weights, masks, n_active=at.n_wanted).masks
    growth = method.growth
    grown_by = None if growth is None or growth.reads_momentum else growth.scores(at)
    scores = grown_by if grown_by and not method.reads_momentum else at.momentum()
    threshold = at.threshold
    if method.prune == "threshold" and threshold is None:
        device = next(iter(masks.values())).device
        threshold = torch.full((), FIRST_THRESHOLD, dtype=torch.float64, device=device)
    updates: list[MaskUpdate] = []
    if at.transposable:
        wanted = scores if grown_by is None else grown_by
        updates.append(
            swap_transposable(
                weights, wanted, masks, at.transposable, prune_rate=at.prune_rate, is_cut=at.is_cut
            )
        )
    rest = [name for name in masks if name not in at.transposable]
    if rest:
        n_in_tiles = sum(masks[name].numel() // 2 for name in at.transposable)
        updates.append(
            update_masks(
                only(weights, rest),
                only(scores, rest),
                only(masks, rest),
                prune_rate=at.prune_rate,
                redistribution=method.redistribution,
                prune=method.prune,
                threshold=threshold,
                growth_scores=None if grown_by is None else only(grown_by, rest),
                caps={name: cap for name, cap in at.caps.items() if name in rest},
                growable=at.places,
                n_active=at.n_wanted - n_in_tiles,
            )
        )
    return updates[0] if len(updates) == 1 else joined(updates, list(masks))
