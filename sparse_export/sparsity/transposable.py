"""Masks that are 2:4 along both axes, so that a weight and its transpose can be multiplied sparsely."""

from __future__ import annotations

from functools import cache
from itertools import combinations, product

import torch
from torch import Tensor

__all__ = ["is_transposable", "transposable_mask", "transposable_tiles"]


@cache
def _tiles() -> tuple[tuple[int, ...], ...]:
    """Every tile of 4 x 4 with two in each row and each column, row after row: there are 90."""
    rows = [tuple(int(i in pair) for i in range(4)) for pair in combinations(range(4), 2)]
    return tuple(
        tuple(entry for row in tile for entry in row)
        for tile in product(rows, repeat=4)
        if all(sum(column) == 2 for column in zip(*tile, strict=True))
    )


def transposable_tiles() -> Tensor:
    """The 90 tiles as bool (90, 16)."""
    return torch.tensor(_tiles(), dtype=torch.bool)


def transposable_mask(scores_OI: Tensor) -> Tensor:
    """The mask of largest total |score| with exactly two of every four along both axes, tile by tile.

    scores_OI: float (O, I), both divisible by 4.  Returns bool (O, I). Of equal tiles the first is taken.
    The choice is exact: all 90 tiles are tried (Hubara et al. 2021, "Accelerated Sparse Neural Training", section 3,
    solve the same problem by a network flow, or greedily).  Raises ValueError for other sizes.
    """
    n_out, n_in = scores_OI.shape
    if n_out % 4 or n_in % 4 or not scores_OI.numel():
        raise ValueError(f"Shape {(n_out, n_in)} cannot be divided into tiles of 4 x 4.")
    blocks = scores_OI.abs().reshape(n_out // 4, 4, n_in // 4, 4).permute(0, 2, 1, 3).reshape(-1, 16)
    tiles = transposable_tiles().to(scores_OI.device)
    best = (blocks @ tiles.to(blocks.dtype).T).argmax(1)
    chosen = tiles[best].reshape(n_out // 4, n_in // 4, 4, 4)
    return chosen.permute(0, 2, 1, 3).reshape(n_out, n_in).contiguous()


def is_transposable(mask_OI: Tensor) -> bool:
    """Has the mask at most two of every four along both axes? Reads from the device."""
    n_out, n_in = mask_OI.shape
    if n_out % 4 or n_in % 4:
        return False
    along_in = mask_OI.reshape(n_out, -1, 4).sum(2)
    along_out = mask_OI.reshape(-1, 4, n_in).sum(1)
    return bool((along_in <= 2).all() & (along_out <= 2).all())
