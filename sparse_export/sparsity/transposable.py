"""Masks that are 2:4 along both axes, so that a weight and its transpose can be multiplied sparsely."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from itertools import combinations, product

import torch
from torch import Tensor

from sparse_export.sparsity.prune import prune_counts, survivors
from sparse_export.sparsity.update import MaskUpdate

__all__ = [
    "cut_to_transposable",
    "is_transposable",
    "takes_transposable",
    "transposable_mask",
    "transposable_tiles",
    "update_transposable",
]

_AT_ONCE = 2**16  # tiles, whose 90 totals each are 47 MB


@cache
def _tiles() -> tuple[tuple[int, ...], ...]:
    """Every tile of 4 x 4 with two in each row and each column, row after row: there are 90."""
    rows = [tuple(int(i in pair) for i in range(4)) for pair in combinations(range(4), 2)]
    return tuple(
        tuple(entry for row in tile for entry in row)
        for tile in product(rows, repeat=4)
        if all(sum(column) == 2 for column in zip(*tile, strict=True))
    )


@cache
def _tiles_on(device: torch.device) -> Tensor:
    """The tiles there: copied once, for a copy makes the host wait."""
    return transposable_tiles().to(device)


def transposable_tiles() -> Tensor:
    """The 90 tiles as bool (90, 16)."""
    return torch.tensor(_tiles(), dtype=torch.bool)


def transposable_mask(scores_OI: Tensor) -> Tensor:
    """The mask of largest total |score| with exactly two of every four along both axes, tile by tile.

    scores_OI: float (O, I), both divisible by 4.  Returns bool (O, I). Of equal tiles the first is taken.
    The choice is exact: all 90 tiles are tried (Hubara et al. 2021, "Accelerated Sparse Neural Training",
    section 3, solve the same problem by a network flow, or greedily).  Raises ValueError for other sizes.
    """
    if not takes_transposable(tuple(scores_OI.shape)):
        raise ValueError(f"Shape {tuple(scores_OI.shape)} cannot be divided into tiles of 4 x 4.")
    return _best(scores_OI, None)


def takes_transposable(shape: tuple[int, ...]) -> bool:
    """Can a weight of this shape, (O, I) or (O, I, 1, ...), be divided into tiles of 4 x 4?"""
    return (
        len(shape) >= 2 and shape[0] % 4 == shape[1] % 4 == 0 and min(shape) > 0 and math.prod(shape[2:]) == 1
    )


def _best(scores_OI: Tensor, kept_OI: Tensor | None) -> Tensor:
    """The tiles of largest total |score|, among those that keep what is to be kept: part of one tile
    everywhere.

    In float64, which neither autocast nor TF32 rounds.
    """
    n_out, n_in = scores_OI.shape
    tiles = _tiles_on(scores_OI.device)
    inside, outside = tiles.double().T, (~tiles).double().T
    scores = _tiled(scores_OI).split(_AT_ONCE)
    kept = [None] * len(scores) if kept_OI is None else _tiled(kept_OI).split(_AT_ONCE)
    chosen = []
    for some, held in zip(scores, kept, strict=True):
        totals = some.abs().double() @ inside
        if held is not None:
            totals = totals.masked_fill_(held.double() @ outside > 0, -1)
        chosen.append(tiles[totals.argmax(1)])
    mask = torch.cat(chosen).reshape(n_out // 4, n_in // 4, 4, 4)
    return mask.permute(0, 2, 1, 3).reshape(n_out, n_in).contiguous()


def _tiled(values_OI: Tensor) -> Tensor:
    """(O, I) as (number of tiles, 16)."""
    n_out, n_in = values_OI.shape
    return values_OI.reshape(n_out // 4, 4, n_in // 4, 4).permute(0, 2, 1, 3).reshape(-1, 16)


@torch.no_grad()
def update_transposable(
    weights: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    prune_rate: float,
) -> MaskUpdate:
    """Prune the smallest weights of every layer, and grow as many where the scores are largest, along both
    axes.

    weights, scores: float, (O, I) or (O, I, 1, 1) by name, in one order.  masks: bool, of the same shapes,
    with exactly two of every four along both axes.  prune_rate: 0 to 1, of each layer's active weights. Each
    tile of 4 x 4 goes to the best of the 90 that hold all its survivors, by its total |score|; survivors
    being part of such a tile, there always is one. So every layer, and every tile, keeps its number of active
    weights, and there is no budget to share between layers. Of equal tiles the first is taken; a pruned
    position may come back at once. Makes no host synchronisation on an accelerator, but for the first time
    there. Raises ValueError for shapes that have no tiles, and on the CPU for values that are not finite.
    """
    _check(weights, scores)
    n_before = torch.stack([torch.count_nonzero(masks[name]) for name in weights])
    rates = torch.full_like(n_before, prune_rate, dtype=torch.float64)
    pruned = survivors(weights, masks, n_before - prune_counts(rates, n_before))
    updated = {
        name: _best(scores[name].flatten(1), mask.flatten(1)).view(mask.shape)
        for name, mask in pruned.items()
    }
    return _update(masks, pruned, updated, rates)


@torch.no_grad()
def cut_to_transposable(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> MaskUpdate:
    """Of every tile keep the eight active weights of largest total |weight| that are two of four along both
    axes.

    weights, masks: as in `update_transposable`, with any number of active weights; a tile that has too few
    for its places gets inactive ones too. Raises ValueError as it does.
    """
    _check(weights, weights)
    updated = {
        name: _best(torch.where(mask, weights[name], 0).flatten(1), None).view(mask.shape)
        for name, mask in masks.items()
    }
    pruned = {name: mask & updated[name] for name, mask in masks.items()}
    n_before = torch.stack([torch.count_nonzero(mask) for mask in masks.values()])
    n_kept = torch.stack([torch.count_nonzero(mask) for mask in pruned.values()])
    return _update(masks, pruned, updated, (n_before - n_kept).double() / n_before.clamp(min=1).double())


def _check(weights: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        if not takes_transposable(tuple(weight.shape)):
            raise ValueError(f"{name} has shape {tuple(weight.shape)}, which has no tiles of 4 x 4.")
        for value in (weight, scores[name]):
            if value.device.type == "cpu" and not value.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinity; a mask update needs finite values.")


def _update(
    masks: Mapping[str, Tensor],
    pruned: Mapping[str, Tensor],
    updated: Mapping[str, Tensor],
    rates: Tensor,
) -> MaskUpdate:
    names = list(masks)
    n_removed = torch.stack([torch.count_nonzero(masks[name] & ~pruned[name]) for name in names])
    n_grown = torch.stack([torch.count_nonzero(updated[name] & ~pruned[name]) for name in names])
    shares = n_grown.double() / n_grown.sum().clamp(min=1).double()

    def by_name(values: Tensor) -> dict[str, Tensor]:
        return dict(zip(names, values.unbind(), strict=True))

    return MaskUpdate(
        masks=dict(updated),
        pruned=dict(pruned),
        shares=by_name(shares),
        prune_rates=by_name(rates),
        n_removed=by_name(n_removed),
        n_grown=by_name(n_grown),
    )


def is_transposable(mask_OI: Tensor) -> bool:
    """Has the mask at most two of every four along both axes? Reads from the device."""
    n_out, n_in = mask_OI.shape
    if n_out % 4 or n_in % 4:
        return False
    along_in = mask_OI.reshape(n_out, -1, 4).sum(2)
    along_out = mask_OI.reshape(-1, 4, n_in).sum(1)
    return bool((along_in <= 2).all() & (along_out <= 2).all())
