"""Pruning alone: masks brought down to a number of active weights, with nothing grown."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparse_export.sparsity.prune import Prune, largest_of_all, survivors
from sparse_export.sparsity.redistribute import growth_budgets
from sparse_export.sparsity.update import MaskUpdate


@torch.no_grad()
def prune_masks(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    n_active: int,
    prune: Prune = "global-magnitude",
    counts: Mapping[str, int] | None = None,
) -> MaskUpdate:
    """Keep exactly `n_active` weights: the largest |weight| of all layers together, or of each by its share.

    weights: float, masks: bool, by name in one order; nothing is changed in place.
    n_active: at most what is active now.  counts: for `magnitude`, what each layer is to have in the end; a
    layer that has less already keeps it, and the others share the rest. Raises ValueError for a number that
    is not from 0 to what is active (on the CPU only), and for another `prune`.
    """
    names = list(weights)
    n_before = torch.stack([torch.count_nonzero(masks[name]) for name in names])
    if n_before.device.type == "cpu" and not 0 <= n_active <= int(n_before.sum()):
        raise ValueError(
            f"{n_active} weights are to be kept, and {int(n_before.sum())} are active; no more were expected."
        )
    n_all = n_before.new_full((), n_active)
    if prune == "global-magnitude":
        kept = largest_of_all(weights, {name: masks[name] for name in names}, n_all)
        n_kept = torch.stack([torch.count_nonzero(mask) for mask in kept.values()])
    elif prune == "magnitude" and counts is not None:
        claims = torch.stack([n_before.new_full((), counts[name]) for name in names]).double()
        n_kept = growth_budgets(claims / claims.sum().clamp(min=1), n_all, n_before)
        kept = survivors(weights, {name: masks[name] for name in names}, n_kept)
    else:
        raise ValueError(f"prune is {prune!r}; global-magnitude, or magnitude with counts, was expected.")

    def by_name(values: Tensor) -> dict[str, Tensor]:
        return dict(zip(names, values.unbind(), strict=True))

    n_removed = n_before - n_kept
    return MaskUpdate(
        masks=kept,
        pruned=kept,
        shares=by_name(n_kept.double() / n_all.clamp(min=1).double()),
        prune_rates=by_name(n_removed.double() / n_before.clamp(min=1).double()),
        n_removed=by_name(n_removed),
        n_grown=by_name(torch.zeros_like(n_removed)),
    )
