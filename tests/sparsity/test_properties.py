"""What holds of every mask update, whatever goes in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from torch import Tensor

from sparse_export.sparsity import MaskUpdate, Redistribution
from tests.sparsity.strategies import (
    DTYPES,
    REDISTRIBUTIONS,
    Inputs,
    random_inputs,
    rates,
    redistributions,
)


def numbers(values: dict[str, Tensor]) -> dict[str, int]:
    return {name: int(value) for name, value in values.items()}


def counts(masks: dict[str, Tensor]) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}


def assert_equal_updates(one: MaskUpdate, other: MaskUpdate) -> None:
    for name in one.masks:
        assert torch.equal(one.masks[name], other.masks[name]), name
        assert torch.equal(one.pruned[name], other.pruned[name]), name
        assert torch.equal(one.shares[name], other.shares[name]), name
        assert torch.equal(one.prune_rates[name], other.prune_rates[name]), name
        assert torch.equal(one.n_removed[name], other.n_removed[name]), name
        assert torch.equal(one.n_grown[name], other.n_grown[name]), name


@given(random_inputs(), rates, redistributions)
def test_the_number_of_active_weights_stays_the_same(
    inputs: Inputs, rate: float, redistribution: Redistribution
) -> None:
    result = inputs.update(rate, redistribution)
    assert sum(counts(result.masks).values()) == sum(int(mask.sum()) for mask in inputs.masks.values())


@given(random_inputs(), rates, redistributions)
def test_the_numbers_describe_the_masks(inputs: Inputs, rate: float, redistribution: Redistribution) -> None:
    result = inputs.update(rate, redistribution)
    removed, grown = numbers(result.n_removed), numbers(result.n_grown)
    before, pruned, after = counts(dict(inputs.masks)), counts(result.pruned), counts(result.masks)
    assert pruned == {name: before[name] - removed[name] for name in before}
    assert after == {name: pruned[name] + grown[name] for name in before}
    assert sum(float(share) for share in result.shares.values()) == pytest.approx(1, abs=1e-12)


@given(random_inputs(), rates, redistributions)
def test_a_growth_budget_is_neither_negative_nor_more_than_is_free(
    inputs: Inputs, rate: float, redistribution: Redistribution
) -> None:
    result = inputs.update(rate, redistribution)
    for name, budget in numbers(result.n_grown).items():
        assert 0 <= budget <= int((~result.pruned[name]).sum())


@given(random_inputs(), rates, redistributions)
def test_masks_are_bool_of_the_weights_shape_in_layer_order(
    inputs: Inputs, rate: float, redistribution: Redistribution
) -> None:
    result = inputs.update(rate, redistribution)
    for masks in (result.masks, result.pruned):
        assert list(masks) == list(inputs.weights)
        for name, mask in masks.items():
            assert mask.shape == inputs.weights[name].shape
            assert mask.dtype == torch.bool


@given(random_inputs(), rates, redistributions)
def test_only_active_weights_die_and_none_that_is_larger_than_a_kept_one(
    inputs: Inputs, rate: float, redistribution: Redistribution
) -> None:
    result = inputs.update(rate, redistribution)
    for name, kept in result.pruned.items():
        assert not (kept & ~inputs.masks[name]).any()
        magnitude = inputs.weights[name].abs()
        dead = magnitude[inputs.masks[name] & ~kept]
        if kept.any() and dead.numel():
            assert dead.max() <= magnitude[kept].min()


@given(random_inputs(), rates, redistributions)
def test_growth_leaves_survivors_alone_and_takes_the_largest_scores_of_the_others(
    inputs: Inputs, rate: float, redistribution: Redistribution
) -> None:
    result = inputs.update(rate, redistribution)
    for name, mask in result.masks.items():
        assert not (result.pruned[name] & ~mask).any()
        magnitude = inputs.scores[name].abs()
        born = magnitude[mask & ~result.pruned[name]]
        passed_over = magnitude[~mask]
        if born.numel() and passed_over.numel():
            assert passed_over.max() <= born.min()


@given(random_inputs(), rates, redistributions)
def test_the_inputs_are_left_as_they_were(
    inputs: Inputs, rate: float, redistribution: Redistribution
) -> None:
    before = [
        {name: tensor.clone() for name, tensor in tensors.items()}
        for tensors in (inputs.weights, inputs.scores, inputs.masks)
    ]
    result = inputs.update(rate, redistribution)
    for mask in (*result.masks.values(), *result.pruned.values()):
        mask.logical_not_()
    for tensors, copies in zip((inputs.weights, inputs.scores, inputs.masks), before, strict=True):
        assert all(torch.equal(tensors[name], copy) for name, copy in copies.items())


@given(random_inputs(), rates, redistributions)
def test_the_same_input_gives_the_same_output(
    inputs: Inputs, rate: float, redistribution: Redistribution
) -> None:
    assert_equal_updates(inputs.update(rate, redistribution), inputs.update(rate, redistribution))


@given(random_inputs(), redistributions)
def test_a_prune_rate_of_zero_changes_nothing(inputs: Inputs, redistribution: Redistribution) -> None:
    result = inputs.update(0.0, redistribution)
    for name, mask in inputs.masks.items():
        assert torch.equal(result.masks[name], mask)


def tied(dtype: torch.dtype, shape: tuple[int, ...] = (6, 4, 3, 3)) -> Inputs:
    generator = torch.Generator().manual_seed(3)
    names = ("first", "second")
    return Inputs(
        weights={n: torch.randint(-3, 4, shape, generator=generator).to(dtype) for n in names},
        scores={n: torch.randint(-3, 4, shape, generator=generator).to(dtype) for n in names},
        masks={n: torch.rand(shape, generator=generator) < 0.4 for n in names},
    )


def mapped(inputs: Inputs, floats: Callable[[Tensor], Tensor], bools: Callable[[Tensor], Tensor]) -> Inputs:
    return Inputs(
        weights={name: floats(tensor) for name, tensor in inputs.weights.items()},
        scores={name: floats(tensor) for name, tensor in inputs.scores.items()},
        masks={name: bools(tensor) for name, tensor in inputs.masks.items()},
    )


def transposed_in_memory(tensor: Tensor) -> Tensor:
    """The same tensor with its axes laid out in reverse."""
    axes = tuple(range(tensor.ndim))[::-1]
    return tensor.permute(axes).contiguous().permute(axes)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def same(tensor: Tensor) -> Tensor:
    return tensor


@pytest.mark.parametrize("redistribution", REDISTRIBUTIONS)
@pytest.mark.parametrize("layout", [transposed_in_memory, channels_last])
@pytest.mark.parametrize("masks_too", [False, True], ids=["weights", "weights-and-masks"])
def test_the_memory_layout_does_not_matter(
    layout: Callable[[Tensor], Tensor], masks_too: bool, redistribution: Redistribution
) -> None:
    plain = tied(torch.float32)
    strided = mapped(plain, layout, layout if masks_too else same)
    assert not strided.weights["first"].is_contiguous()
    assert_equal_updates(strided.update(0.3, redistribution), plain.update(0.3, redistribution))


def test_a_slice_of_a_larger_tensor_is_a_layer_like_any_other() -> None:
    plain = tied(torch.float32, (7, 9))
    sliced = mapped(
        plain, lambda t: torch.stack([t, t], dim=-1)[..., 0], lambda t: torch.stack([t, t], dim=-1)[..., 0]
    )
    assert_equal_updates(sliced.update(0.3), plain.update(0.3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_every_dtype_holds_give_the_same_update_in_each(dtype: torch.dtype) -> None:
    assert_equal_updates(tied(dtype).update(0.3), tied(torch.float64).update(0.3))


def test_parameters_that_require_grad_are_weights_like_any_other() -> None:
    plain = tied(torch.float32)
    result = mapped(plain, torch.nn.Parameter, same).update(0.3)
    assert_equal_updates(result, plain.update(0.3))
    assert not any(share.requires_grad for share in result.shares.values())


def test_a_layer_of_a_single_number_without_axes_is_handled() -> None:
    one = Inputs(
        weights={"scale": torch.tensor(2.0)},
        scores={"scale": torch.tensor(1.0)},
        masks={"scale": torch.tensor(True)},
    )
    result = one.update(0.5)
    assert result.masks["scale"].shape == ()
    assert bool(result.masks["scale"])


def test_on_ties_the_lower_index_is_kept_and_grown() -> None:
    inputs = Inputs(
        weights={"layer": torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0, 0.0, 0.0, 0.0])},
        scores={"layer": torch.tensor([0.0, 0.0, 0.0, 0.0, 5.0, -5.0, 5.0, 5.0])},
        masks={"layer": torch.tensor([True] * 4 + [False] * 4)},
    )
    result = inputs.update(0.5)
    assert result.pruned["layer"].tolist() == [True, True] + [False] * 6
    assert result.masks["layer"].tolist() == [True, True, False, False, True, True, False, False]


def test_a_pruned_position_can_be_grown_again_at_once() -> None:
    inputs = Inputs(
        weights={"layer": torch.tensor([1.0, 2.0, 0.0])},
        scores={"layer": torch.tensor([9.0, 0.0, 1.0])},
        masks={"layer": torch.tensor([True, True, False])},
    )
    result = inputs.update(0.5)
    assert result.pruned["layer"].tolist() == [False, True, False]
    assert result.masks["layer"].tolist() == [True, True, False]


def test_the_statistic_of_half_precision_does_not_overflow() -> None:
    n = 4096
    big = Inputs(
        weights={name: torch.ones(n, dtype=torch.float16) for name in ("a", "b")},
        scores={
            "a": torch.full((n,), 60000.0, dtype=torch.float16),
            "b": torch.full((n,), 20000.0, dtype=torch.float16),
        },
        masks={name: torch.arange(n) < n // 4 for name in ("a", "b")},
    )
    assert float(big.update(0.5).shares["a"]) == pytest.approx(0.75, rel=1e-3)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_the_shares_of_a_large_layer_are_exact_for_any_number_of_threads(n_threads: int) -> None:
    n = 3_000_000
    generator = torch.Generator().manual_seed(5)
    score = torch.rand(n, generator=generator)
    mask = torch.ones(n, dtype=torch.bool)
    small = torch.tensor([0.5, 0.5])
    exact = float(score.double().mean())
    threads = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        inputs = Inputs(
            weights={"large": score, "small": small},
            scores={"large": score, "small": small},
            masks={"large": mask, "small": torch.tensor([True, False])},
        )
        share = float(inputs.update(0.0).shares["large"])
    finally:
        torch.set_num_threads(threads)
    assert share == pytest.approx(exact / (exact + 0.5), rel=1e-12)
