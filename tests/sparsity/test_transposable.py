from __future__ import annotations

import math
from itertools import combinations, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_export.sparsity import NMPattern, update_masks
from sparse_export.sparsity.caps import Cap
from sparse_export.sparsity.transposable import (
    cut_to_transposable,
    is_transposable,
    takes_transposable,
    transposable_mask,
    transposable_tiles,
    update_transposable,
)
from sparse_export.sparsity.update import joined


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


def _drawn(seed: int, shape: tuple[int, ...] = (12, 8)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, scores and a transposable mask."""
    generator = torch.Generator().manual_seed(seed)
    weight, score, start = (torch.randn(shape, generator=generator) for _ in range(3))
    return weight, score, transposable_mask(start.flatten(1)).view(shape)


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_an_update_keeps_the_largest_and_fills_every_tile_as_well_as_any_could(
    seed: int, rate: float
) -> None:
    weight, score, mask = _drawn(seed)
    update = update_transposable({"a": weight}, {"a": score}, {"a": mask}, prune_rate=rate)
    new, kept = update.masks["a"], update.pruned["a"]
    n_active = int(mask.sum())
    n_removed = math.ceil(rate * n_active)
    assert is_transposable(new)
    assert int(new.sum()) == n_active
    assert int(update.n_removed["a"]) == int(update.n_grown["a"]) == n_removed
    assert bool((new | ~kept).all())
    order = (weight.abs() * mask).flatten().argsort(descending=True)
    assert set(kept.flatten().nonzero().flatten().tolist()) == set(order[: n_active - n_removed].tolist())
    tile, held, chosen = (value[4:8, 4:8].flatten() for value in (score.abs(), kept, new))
    totals = [float(tile[one].sum()) for one in transposable_tiles() if bool((one | ~held).all())]
    assert float(tile[chosen].sum()) == pytest.approx(max(totals), rel=1e-5)


def test_autocast_does_not_round_the_choice() -> None:
    scores = 1 + 0.01 * torch.rand((64, 64), generator=torch.Generator().manual_seed(0))
    wanted = transposable_mask(scores)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(transposable_mask(scores), wanted)


def test_a_weight_of_more_tiles_than_are_looked_at_at_once_is_chosen_for_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, score, mask = _drawn(9, (32, 24))
    whole = update_transposable({"a": weight}, {"a": score}, {"a": mask}, prune_rate=0.5)
    monkeypatch.setattr("sparse_export.sparsity.transposable._AT_ONCE", 5)
    parts = update_transposable({"a": weight}, {"a": score}, {"a": mask}, prune_rate=0.5)
    assert torch.equal(whole.masks["a"], parts.masks["a"])


def test_a_rate_of_nothing_changes_nothing_and_of_everything_takes_the_best_tiles() -> None:
    weight, score, mask = _drawn(3)
    still = update_transposable({"a": weight}, {"a": score}, {"a": mask}, prune_rate=0.0)
    assert torch.equal(still.masks["a"], mask)
    anew = update_transposable({"a": weight}, {"a": score}, {"a": mask}, prune_rate=1.0)
    assert torch.equal(anew.masks["a"], transposable_mask(score))


def test_a_cut_takes_the_best_of_what_is_active() -> None:
    weight, _score, _ = _drawn(4)
    dense = torch.ones_like(weight, dtype=torch.bool)
    assert torch.equal(cut_to_transposable({"a": weight}, {"a": dense}).masks["a"], transposable_mask(weight))
    some = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    cut = cut_to_transposable({"a": weight}, {"a": some})
    assert is_transposable(cut.masks["a"])
    assert torch.equal(cut.masks["a"], transposable_mask(torch.where(some, weight, 0)))
    assert torch.equal(cut.pruned["a"], some & cut.masks["a"])
    assert int(cut.n_removed["a"]) == int((some & ~cut.masks["a"]).sum())
    assert int(cut.n_grown["a"]) == int((cut.masks["a"] & ~some).sum())


def test_convolutions_of_one_pixel_are_matrices_and_others_are_not() -> None:
    assert takes_transposable((8, 4, 1, 1))
    for shape in ((8, 4, 3, 3), (8, 6), (6, 8), (8,), (), (0, 4)):
        assert not takes_transposable(shape)
    weight, score, mask = _drawn(5, (8, 4, 1, 1))
    update = update_transposable({"a": weight}, {"a": score}, {"a": mask}, prune_rate=0.5)
    assert update.masks["a"].shape == weight.shape
    with pytest.raises(ValueError, match=r"a has shape \(8, 4, 3, 3\)"):
        cut_to_transposable({"a": torch.zeros(8, 4, 3, 3)}, {"a": torch.zeros(8, 4, 3, 3, dtype=torch.bool)})


@pytest.mark.parametrize("where", ["weights", "scores"])
def test_values_that_are_no_numbers_are_refused_on_the_cpu(where: str) -> None:
    weight, score, mask = _drawn(6)
    {"weights": weight, "scores": score}[where][0, 0] = float("nan")
    with pytest.raises(ValueError, match="a holds NaN"):
        update_transposable({"a": weight}, {"a": score}, {"a": mask}, prune_rate=0.5)


def test_an_update_needs_no_value_on_the_host() -> None:
    weight, score, mask = (value.to("meta") for value in _drawn(7))
    for update in (
        update_transposable({"a": weight}, {"a": score}, {"a": mask}, prune_rate=0.5),
        cut_to_transposable({"a": weight}, {"a": mask}),
    ):
        assert update.masks["a"].device.type == "meta"
        assert update.masks["a"].shape == weight.shape


def test_updates_of_different_layers_are_joined_in_their_order() -> None:
    weight, score, mask = _drawn(8)
    both = update_transposable({"b": weight}, {"b": score}, {"b": mask}, prune_rate=0.5)
    cap = Cap(pattern=NMPattern(n=2, m=4), axis=1)
    other = update_masks({"a": weight}, {"a": score}, {"a": mask}, prune_rate=0.3, caps={"a": cap})
    one = joined((both, other), ["a", "b"])
    assert list(one.masks) == list(one.n_grown) == ["a", "b"]
    assert one.masks["a"] is other.masks["a"]
    assert one.masks["b"] is both.masks["b"]
    assert float(sum(one.shares.values())) == pytest.approx(1.0)
    assert float(one.shares["a"]) == pytest.approx(
        int(other.n_grown["a"]) / (int(other.n_grown["a"]) + int(both.n_grown["b"]))
    )
