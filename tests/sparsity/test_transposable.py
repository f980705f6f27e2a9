from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_export.sparsity.transposable import is_transposable, transposable_mask, transposable_tiles


def _best_total(tile: list[list[float]]) -> float:
    """The largest total of two in each row and each column, by trying all choices of rows."""
    pairs = list(combinations(range(4), 2))
    totals = [
        sum(tile[row][column] for row, pair in enumerate(choice) for column in pair)
        for choice in product(pairs, repeat=4)
        if all(sum(column in pair for pair in choice) == 2 for column in range(4))
    ]
    return max(totals)


def test_there_are_ninety_tiles_and_each_has_two_in_every_row_and_column() -> None:
    tiles = transposable_tiles().view(-1, 4, 4)
    assert len(tiles) == len({tuple(tile.flatten().tolist()) for tile in tiles}) == 90
    assert (tiles.sum(1) == 2).all()
    assert (tiles.sum(2) == 2).all()


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 3))
def test_every_tile_keeps_as_much_as_any_choice_can(seed: int, n_down: int, n_across: int) -> None:
    scores = torch.randn((4 * n_down, 4 * n_across), generator=torch.Generator().manual_seed(seed))
    mask = transposable_mask(scores)
    assert is_transposable(mask)
    assert mask.sum() == mask.numel() // 2
    first = scores[-4:, -4:].abs()
    kept = float((first * mask[-4:, -4:]).sum())
    assert kept == pytest.approx(_best_total(first.tolist()), rel=1e-5)


def test_the_transpose_of_a_mask_is_one_too() -> None:
    mask = transposable_mask(torch.randn(16, 32))
    assert is_transposable(mask.T.contiguous())


def test_a_mask_along_one_axis_alone_is_none() -> None:
    mask = torch.tensor([[1, 1, 0, 0]] * 4, dtype=torch.bool)
    assert not is_transposable(mask)
    assert not is_transposable(torch.zeros((4, 6), dtype=torch.bool))


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (0, 4)])
def test_sizes_that_tiles_do_not_fill_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="tiles of 4 x 4"):
        transposable_mask(torch.zeros(shape))
