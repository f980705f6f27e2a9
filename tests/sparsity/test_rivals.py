"""Pruning over all layers, by a threshold and alone; growth by other scores: held against loops over
lists.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_export.sparsity import gradual_density, largest_of_all, prune_masks, update_masks
from sparse_export.sparsity.caps import Cap
from sparse_export.sparsity.pattern import NMPattern, obeys
from sparse_export.sparsity.prune import next_threshold
from tests.sparsity.oracle import Layer
from tests.sparsity.strategies import Inputs, inputs_from_layers, random_inputs, rates, tied_layers

FEW = settings(max_examples=40)


def counts(masks: dict[str, Tensor]) -> list[int]:
    return [int(mask.sum()) for mask in masks.values()]


def n_active(inputs: Inputs) -> int:
    return sum(int(mask.sum()) for mask in inputs.masks.values())


def ranked(layers: list[Layer]) -> list[tuple[int, int]]:
    """(layer, index) of the active weights, largest first, ties by layer and index."""
    places = [
        (-abs(value), n, index)
        for n, layer in enumerate(layers)
        for index, value in enumerate(layer.weight)
        if layer.mask[index]
    ]
    return [(n, index) for _, n, index in sorted(places)]


def as_places(masks: dict[str, Tensor]) -> set[tuple[int, int]]:
    return {
        (n, index)
        for n, mask in enumerate(masks.values())
        for index, kept in enumerate(mask.tolist())
        if kept
    }


@FEW
@given(tied_layers(), st.floats(0, 1))
def test_the_largest_of_all_layers_are_those_of_one_long_list(layers: list[Layer], part: float) -> None:
    inputs = inputs_from_layers(layers)
    count = int(part * n_active(inputs))
    chosen = largest_of_all(inputs.weights, inputs.masks, torch.tensor(count))
    assert as_places(chosen) == set(ranked(layers)[:count])


@FEW
@given(tied_layers(), rates)
def test_global_pruning_removes_the_smallest_of_all_layers_together(layers: list[Layer], rate: float) -> None:
    inputs = inputs_from_layers(layers)
    result = update_masks(
        inputs.weights, inputs.scores, inputs.masks, prune_rate=rate, prune="global-magnitude"
    )
    n_all = n_active(inputs)
    n_removed = sum(int(n) for n in result.n_removed.values())
    assert n_removed == -int(-rate * n_all // 1)
    assert as_places(result.pruned) == set(ranked(layers)[: n_all - n_removed])
    assert sum(counts(result.masks)) == n_all


@FEW
@given(tied_layers(), st.sampled_from((0.1, 0.25, 0.6, 5.0)))
def test_a_threshold_removes_what_is_below_it_and_the_count_is_kept(
    layers: list[Layer], threshold: float
) -> None:
    inputs = inputs_from_layers(layers)
    result = update_masks(
        inputs.weights,
        inputs.scores,
        inputs.masks,
        prune_rate=0.3,
        prune="threshold",
        redistribution="survivors",
        threshold=torch.tensor(threshold, dtype=torch.float64),
    )
    kept = {
        (n, index)
        for n, layer in enumerate(layers)
        for index, value in enumerate(layer.weight)
        if layer.mask[index] and abs(value) >= threshold
    }
    assert as_places(result.pruned) == kept
    assert sum(counts(result.masks)) == n_active(inputs)


@pytest.mark.parametrize(
    ("n_removed", "expected"), [(0, 2.0), (89, 2.0), (90, 1.0), (100, 1.0), (110, 1.0), (111, 0.5)]
)
def test_the_threshold_doubles_below_a_tenth_too_few_and_halves_above(
    n_removed: int, expected: float
) -> None:
    moved = next_threshold(torch.tensor(1.0, dtype=torch.float64), torch.tensor(n_removed), torch.tensor(100))
    assert float(moved) == expected


@FEW
@given(random_inputs(), rates)
def test_with_their_own_budgets_layers_keep_their_counts(inputs: Inputs, rate: float) -> None:
    result = inputs.update(rate, "own")
    assert counts(result.masks) == counts(dict(inputs.masks))
    assert list(map(int, result.n_grown.values())) == list(map(int, result.n_removed.values()))


@FEW
@given(random_inputs(), rates)
def test_growth_by_other_scores_takes_the_largest_of_those(inputs: Inputs, rate: float) -> None:
    generator = torch.Generator().manual_seed(1)
    other = {name: torch.rand(value.shape, generator=generator) for name, value in inputs.scores.items()}
    plain = inputs.update(rate)
    result = update_masks(inputs.weights, inputs.scores, inputs.masks, prune_rate=rate, growth_scores=other)
    assert counts(result.masks) == counts(plain.masks)
    for name, mask in result.masks.items():
        assert torch.equal(result.pruned[name], plain.pruned[name])
        born, passed_over = other[name][mask & ~result.pruned[name]], other[name][~mask]
        assert not born.numel() or not passed_over.numel() or passed_over.max() <= born.min()


@pytest.mark.parametrize("prune", ["magnitude", "global-magnitude", "threshold"])
@pytest.mark.parametrize("redistribution", ["own", "survivors", "momentum"])
def test_every_combination_obeys_a_cap(prune: str, redistribution: str) -> None:
    generator = torch.Generator().manual_seed(4)
    cap = Cap(pattern=NMPattern(n=2, m=4), axis=1)
    weights = {name: torch.randn(6, 16, generator=generator) for name in ("a", "b")}
    masks = {name: torch.zeros(6, 16, dtype=torch.bool) for name in weights}
    for mask in masks.values():
        mask[:, ::4] = True
        mask[:, 1::8] = True
    result = update_masks(
        weights,
        {name: torch.randn(6, 16, generator=generator) for name in weights},
        masks,
        prune_rate=0.4,
        prune=prune,  # type: ignore[arg-type]
        redistribution=redistribution,  # type: ignore[arg-type]
        threshold=torch.tensor(0.5, dtype=torch.float64),
        caps={"a": cap, "b": cap},
    )
    assert sum(counts(result.masks)) == sum(counts(masks))
    assert all(obeys(mask, 1, cap.pattern) for mask in result.masks.values())
    assert any((result.masks[name] ^ masks[name]).any() for name in masks)


@pytest.mark.parametrize("prune", ["global-magnitude", "threshold"])
def test_the_other_ways_to_prune_need_no_value_on_the_host(prune: str) -> None:
    def meta(values: Tensor) -> dict[str, Tensor]:
        return {"a": values.to("meta"), "b": values.T.to("meta")}

    values = torch.randn(6, 8)
    result = update_masks(
        meta(values),
        meta(values),
        meta(values > 0),
        prune_rate=0.3,
        prune=prune,  # type: ignore[arg-type]
        redistribution="survivors",
        threshold=torch.tensor(0.5, dtype=torch.float64, device="meta"),
        growth_scores=meta(values),
    )
    assert result.masks["b"].shape == (8, 6)
    assert result.masks["b"].device.type == "meta"


@FEW
@given(tied_layers(), st.floats(0, 1))
def test_pruning_alone_keeps_the_largest_of_all_layers(layers: list[Layer], part: float) -> None:
    inputs = inputs_from_layers(layers)
    count = int(part * n_active(inputs))
    result = prune_masks(inputs.weights, inputs.masks, n_active=count)
    assert as_places(result.masks) == set(ranked(layers)[:count])
    assert not any(int(n) for n in result.n_grown.values())


@FEW
@given(random_inputs(), st.floats(0, 1))
def test_pruning_alone_layer_by_layer_keeps_the_number_and_grows_nothing(inputs: Inputs, part: float) -> None:
    count = int(part * n_active(inputs))
    wanted = {name: mask.numel() for name, mask in inputs.masks.items()}
    result = prune_masks(inputs.weights, inputs.masks, n_active=count, prune="magnitude", counts=wanted)
    assert sum(counts(result.masks)) == count
    for name, mask in result.masks.items():
        assert not (mask & ~inputs.masks[name]).any()
        magnitude = inputs.weights[name].abs()
        dead, kept = magnitude[inputs.masks[name] & ~mask], magnitude[mask]
        assert not dead.numel() or not kept.numel() or dead.max() <= kept.min()


def test_pruning_alone_gives_full_layers_what_they_are_to_have() -> None:
    weights = {"a": torch.randn(10, 10), "b": torch.randn(5, 20)}
    full = {name: torch.ones_like(value, dtype=torch.bool) for name, value in weights.items()}
    result = prune_masks(weights, full, n_active=40, prune="magnitude", counts={"a": 10, "b": 30})
    assert counts(result.masks) == [10, 30]


def test_pruning_alone_refuses_what_it_cannot_do() -> None:
    weights, masks = {"a": torch.randn(4)}, {"a": torch.tensor([True, True, False, False])}
    with pytest.raises(ValueError, match="3 weights are to be kept, and 2 are active"):
        prune_masks(weights, masks, n_active=3)
    with pytest.raises(ValueError, match="prune is 'threshold'"):
        prune_masks(weights, masks, n_active=1, prune="threshold")


def test_a_threshold_is_needed_where_pruning_goes_by_one() -> None:
    values = {"a": torch.randn(4)}
    with pytest.raises(ValueError, match="there is no threshold"):
        update_masks(values, values, {"a": torch.ones(4).bool()}, prune_rate=0.1, prune="threshold")
    with pytest.raises(ValueError, match="prune is 'SET'; one of magnitude, global-magnitude, threshold"):
        update_masks(values, values, {"a": torch.ones(4).bool()}, prune_rate=0.1, prune="SET")  # type: ignore[arg-type]


def test_the_density_of_gradual_pruning_falls_by_a_cube_from_one_to_the_end() -> None:
    assert gradual_density(0, 100, 0.1) == 1.0
    assert gradual_density(50, 100, 0.1) == pytest.approx(0.1 + 0.9 / 8)
    assert gradual_density(100, 100, 0.1) == gradual_density(130, 100, 0.1) == 0.1
    course = [gradual_density(step, 100, 0.05) for step in range(101)]
    assert course == sorted(course, reverse=True)
