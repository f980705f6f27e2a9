"""One mask update: prune everywhere, divide the freed weights over the layers, grow as many."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from sparse_export.sparsity.caps import Cap, growth_candidates, room, under_cap
from sparse_export.sparsity.grow import grown
from sparse_export.sparsity.pattern import fits
from sparse_export.sparsity.prune import (
    Prune,
    largest_of_all,
    layer_prune_rates,
    next_threshold,
    prune_counts,
    survivors,
    survivors_above,
)
from sparse_export.sparsity.redistribute import growth_budgets, shares_from_statistic

Redistribution = Literal["momentum", "magnitude", "nonzeros", "none", "own", "survivors"]
_AFTER_PRUNING = ("own", "survivors")  # shares that follow from what pruning did


@dataclass(frozen=True, kw_only=True)
class MaskUpdate:
    """What one update did. Every dict is in layer order; the numbers are tensors of shape () on the layers'
    device, so that reading them, not making them, is what may wait for an accelerator.

    masks: bool, after the update.  pruned: bool, after pruning and before growth (True = survived).
    shares: float64, of the growth budget; they sum to 1.  prune_rates: float64, as used in each layer.
    n_removed, n_grown: int64; their sums are equal, unless another number of active weights was asked for.
    threshold: float64, for the next update, where pruning goes by one.
    """

    masks: dict[str, Tensor]
    pruned: dict[str, Tensor]
    shares: dict[str, Tensor]
    prune_rates: dict[str, Tensor]
    n_removed: dict[str, Tensor]
    n_grown: dict[str, Tensor]
    threshold: Tensor | None = None


def joined(updates: Sequence[MaskUpdate], names: Sequence[str]) -> MaskUpdate:
    """The updates of different layers as one, in the order of names. shares: of all that was grown."""
    n_grown = {name: count for update in updates for name, count in update.n_grown.items()}
    total = torch.stack(list(n_grown.values())).sum().clamp(min=1).double()

    def ordered(field: str) -> dict[str, Tensor]:
        every = {name: value for update in updates for name, value in getattr(update, field).items()}
        return {name: every[name] for name in names}

    return MaskUpdate(
        masks=ordered("masks"),
        pruned=ordered("pruned"),
        shares={name: n_grown[name].double() / total for name in names},
        prune_rates=ordered("prune_rates"),
        n_removed=ordered("n_removed"),
        n_grown={name: n_grown[name] for name in names},
        threshold=next((update.threshold for update in updates if update.threshold is not None), None),
    )


def _check(
    weights: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    rate: float,
    redistribution: str,
    prune: str,
) -> None:
    if not weights:
        raise ValueError("There are no layers; a mask update needs at least one.")
    if not math.isfinite(rate) or not 0 <= rate <= 1:
        raise ValueError(f"prune_rate is {rate}; a number from 0 to 1 was expected.")
    if redistribution not in get_args(Redistribution):
        raise ValueError(
            f"redistribution is {redistribution!r}; one of {', '.join(get_args(Redistribution))} was "
            "expected."
        )
    if prune not in get_args(Prune):
        raise ValueError(f"prune is {prune!r}; one of {', '.join(get_args(Prune))} was expected.")
    if not list(weights) == list(scores) == list(masks):
        raise ValueError(
            f"weights, scores and masks name different layers: {list(weights)}, {list(scores)}, "
            f"{list(masks)}. "
            "The same names in the same order were expected."
        )
    device = next(iter(weights.values())).device
    for name, weight in weights.items():
        score, mask = scores[name], masks[name]
        if not weight.shape == score.shape == mask.shape or weight.numel() == 0:
            raise ValueError(
                f"{name}: weight, score and mask have shapes {tuple(weight.shape)}, {tuple(score.shape)} and "
                f"{tuple(mask.shape)}; one shape with at least one entry was expected."
            )
        if not (weight.is_floating_point() and score.is_floating_point() and mask.dtype == torch.bool):
            raise ValueError(
                f"{name}: weight, score and mask are {weight.dtype}, {score.dtype} and {mask.dtype}; "
                "float, float and bool were expected."
            )
        if not weight.device == score.device == mask.device == device:
            raise ValueError(f"{name} is not on one device with the other layers ({device}).")


def _check_caps(weights: Mapping[str, Tensor], caps: Mapping[str, Cap]) -> None:
    for name, cap in caps.items():
        if name not in weights:
            raise ValueError(f"There is a cap for {name}; one of {', '.join(weights)} was expected.")
        shape = tuple(weights[name].shape)
        if not -len(shape) <= cap.axis < len(shape) or not fits(shape, cap.axis, cap.pattern):
            raise ValueError(
                f"{name} has shape {shape}; a cap of {cap.pattern} along axis {cap.axis} needs a multiple of "
                f"{cap.pattern.m} there."
            )


def _statistic(
    redistribution: Redistribution, weight: Tensor, score: Tensor, mask: Tensor, n_active: Tensor
) -> Tensor:
    """The layer's claim to weights: float64, shape ()."""
    if redistribution in _AFTER_PRUNING:
        return n_active.new_zeros((), dtype=torch.float64)
    if redistribution == "none":
        return n_active.new_full((), mask.numel(), dtype=torch.float64)
    if redistribution == "nonzeros":
        return n_active.double()
    values = torch.where(mask, score if redistribution == "momentum" else weight, 0)
    # In float64: a float32 sum of VGG-D's largest layer is off by up to 2e-5, differently with the number of
    # threads.
    return values.abs_().sum(dtype=torch.float64) / n_active.clamp(min=1).double()


@dataclass(frozen=True, kw_only=True)
class _Pruned:
    """masks: what survived.

    n_kept: int64, of each layer.  rates: float64, as used.  threshold: for the next update.
    """

    masks: dict[str, Tensor]
    n_kept: Tensor
    rates: Tensor
    threshold: Tensor | None


def _pruned_by_layer(
    weights: Mapping[str, Tensor],
    allowed: Mapping[str, Tensor],
    n_before: Tensor,
    rates: Tensor,
    *,
    capped: Container[str],
) -> _Pruned:
    """The smallest weights of every layer by its rate, and no fewer than the caps ask for."""
    counts = [
        torch.count_nonzero(mask) if name in capped else before
        for (name, mask), before in zip(allowed.items(), n_before.unbind(), strict=True)
    ]
    n_kept = torch.minimum(n_before - prune_counts(rates, n_before), torch.stack(counts))
    return _Pruned(masks=survivors(weights, allowed, n_kept), n_kept=n_kept, rates=rates, threshold=None)


def _pruned_by_threshold(
    weights: Mapping[str, Tensor],
    allowed: Mapping[str, Tensor],
    n_before: Tensor,
    prune_rate: float,
    prune: Prune,
    threshold: Tensor | None,
) -> _Pruned:
    """What one threshold for all layers leaves: the one given, or that which prunes at the rate."""
    n_all = n_before.sum()
    n_wanted = (prune_rate * n_all.double()).ceil().long()
    if prune == "threshold" and threshold is not None:
        masks = {name: survivors_above(weights[name], allowed[name], threshold) for name in weights}
    else:
        n_allowed = torch.stack([torch.count_nonzero(mask) for mask in allowed.values()])
        masks = largest_of_all(weights, allowed, torch.minimum(n_all - n_wanted, n_allowed.sum()))
    n_kept = torch.stack([torch.count_nonzero(mask) for mask in masks.values()])
    n_removed = n_before - n_kept
    if prune == "threshold" and threshold is not None:
        threshold = next_threshold(threshold, n_removed.sum(), n_wanted)
    rates = n_removed.double() / n_before.clamp(min=1).double()
    return _Pruned(masks=masks, n_kept=n_kept, rates=rates, threshold=threshold)


@torch.no_grad()
def update_masks(
    weights: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    prune_rate: float,
    redistribution: Redistribution = "momentum",
    prune: Prune = "magnitude",
    threshold: Tensor | None = None,
    growth_scores: Mapping[str, Tensor] | None = None,
    caps: Mapping[str, Cap] | None = None,
    growable: Mapping[str, Tensor] | None = None,
    n_active: int | None = None,
) -> MaskUpdate:
    """Prune the smallest weights of every layer and grow as many where the scores are largest.

    weights, scores, masks: by layer name, in one order; of a layer all three have one shape: weights and
    scores float, masks bool (True = kept). scores is the growth statistic of every position, usually the
    momentum; its magnitude counts. All on one device; nothing is changed in place.  prune_rate: 0 to 1, the
    fraction of active weights that a layer loses.  redistribution: what a layer's share of the budget
    follows: mean |score| of its active weights (`momentum`), their mean |weight| (`magnitude`), their number
    (`nonzeros`), the layer's size (`none`), what pruning took from it (`own`: every layer keeps its count,
    where caps allow) or left of it (`survivors`, at least one).  prune: the smallest |weight| of each layer
    by its rate (`magnitude`), of all layers together (`global-magnitude`), or those below one `threshold`,
    which then follows the rate from update to update, see `sparse_export.sparsity.prune.next_threshold`.
    threshold: float64, shape (), on the layers' device.  growth_scores: what growth goes by, where that is
    another statistic than `scores`.  caps: of each layer named, how many may be active in a group; what is
    over is pruned first.  growable: bool, by layer name, in the weights' shapes: where weights may be grown;
    None for everywhere; not together with caps.  n_active: how many weights are to be active over all layers
    afterwards; None: as many as before.

    The number of active weights over all layers is exactly what was asked for. A position that is pruned may
    be grown again in the same update. On ties the lower index is kept, and grown. On an accelerator nothing
    here waits for the device. Raises ValueError for inputs that do not fit together, for a cap whose M does
    not divide its axis, for a number of active weights that the caps have no room for or that survivors of
    pruning exceed (on the CPU only), and on the CPU for NaN that would decide anything or a statistic that is
    not finite (elsewhere the shares then follow the active counts).

    Source: Dettmers & Zettlemoyer 2019, Algorithm 1, as sparse_learning runs it. On purpose different from
    it: removed = grown in every update (there the count is corrected afterwards), a layer may fill up wholly
    (there to 99 %), budgets are never negative, ties are decided.
    """
    _check(weights, scores, masks, prune_rate, redistribution, prune)
    if growth_scores is not None:
        _check(weights, growth_scores, masks, prune_rate, redistribution, prune)
    if prune == "threshold" and threshold is None:
        raise ValueError("prune is 'threshold', and there is no threshold; one was expected.")
    caps = caps or {}
    _check_caps(weights, caps)
    if caps and growable is not None:
        raise ValueError("caps and growable exclude each other; one of them was expected.")
    if growable is not None:
        _check(weights, scores, growable, prune_rate, redistribution, prune)
    names = list(weights)
    active = {name: torch.count_nonzero(masks[name]) for name in names}
    n_before = torch.stack(list(active.values()))
    # Filled on the device: copying a list there would make the host wait.
    n_weights = torch.stack([n_before.new_full((), masks[name].numel()) for name in names])
    statistic = torch.stack(
        [_statistic(redistribution, weights[name], scores[name], masks[name], active[name]) for name in names]
    )
    if statistic.device.type == "cpu" and not statistic.isfinite().all():
        wrong = ", ".join(
            name for name, ok in zip(names, statistic.isfinite().tolist(), strict=True) if not ok
        )
        raise ValueError(
            f"Active weights or scores of {wrong} hold NaN or infinity; a mask update needs finite values."
        )
    shares = shares_from_statistic(statistic, n_before)
    rates = torch.full_like(shares, prune_rate)
    if redistribution not in _AFTER_PRUNING:
        rates = layer_prune_rates(shares, n_before, n_weights, prune_rate)
    allowed = {
        name: under_cap(weights[name], masks[name], caps[name]) if name in caps else masks[name]
        for name in names
    }
    if prune == "magnitude":
        done = _pruned_by_layer(weights, allowed, n_before, rates, capped=set(caps))
    else:
        done = _pruned_by_threshold(weights, allowed, n_before, prune_rate, prune, threshold)
    pruned, n_kept, n_removed = done.masks, done.n_kept, n_before - done.n_kept
    if redistribution in _AFTER_PRUNING:
        claims = n_removed if redistribution == "own" else n_kept.clamp(min=1)
        shares = shares_from_statistic(claims.double(), n_before)
    budget = n_removed.sum() if n_active is None else n_active - n_kept.sum()
    wanted = scores if growth_scores is None else growth_scores
    free = {
        name: growth_candidates(wanted[name], pruned[name], caps[name]) if name in caps else ~pruned[name]
        for name in names
    }
    capacity = n_weights - n_kept
    if growable is not None:
        free = {name: places & growable[name] for name, places in free.items()}
        capacity = torch.stack([torch.count_nonzero(places) for places in free.values()])
    if caps:
        rooms = [
            room(pruned[name], caps[name]) if name in caps else places
            for name, places in zip(names, capacity.unbind(), strict=True)
        ]
        capacity = torch.stack(rooms)
    if budget.device.type == "cpu" and not 0 <= int(budget) <= int(capacity.sum()):
        raise ValueError(
            f"{int(budget)} weights are to be grown, and there is room for {int(capacity.sum())}. Another "
            "n_active "
            "or prune_rate, or wider caps, were expected."
        )
    n_grown = growth_budgets(shares, budget, capacity)
    born = grown(wanted, free, n_grown)
    updated = {name: pruned[name] | born[name] for name in names}

    def by_name(values: Tensor) -> dict[str, Tensor]:
        return dict(zip(names, values.unbind(), strict=True))

    return MaskUpdate(
        masks=updated,
        pruned=pruned,
        shares=by_name(shares),
        prune_rates=by_name(done.rates),
        n_removed=by_name(n_removed),
        n_grown=by_name(n_grown),
        threshold=done.threshold,
    )
