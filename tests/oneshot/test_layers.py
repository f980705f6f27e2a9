"""Layers of a network pruned by what was learnt of their inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparse_export.errors import UnknownNameError
from sparse_export.oneshot.layers import (
    Method,
    prune_weight,
    require_method,
    worth_of_weight,
)
from sparse_export.sparsity.caps import Cap
from sparse_export.sparsity.pattern import NMPattern, obeys
from tests.oneshot.hooked import InputStatistics, input_statistics

TWO_FOUR = NMPattern(n=2, m=4)
CAP = Cap(pattern=TWO_FOUR, axis=1)
METHODS: tuple[Method, ...] = ("magnitude", "activation", "reconstruction")


def seen(layer: nn.Module, x: Tensor) -> InputStatistics:
    return input_statistics(layer, [x], ["weight"], gram=True)["weight"]


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(8, 6), torch.randn(50, 8)),
        (nn.Conv2d(8, 6, 3, padding=1), torch.randn(5, 8, 6, 6)),
        (nn.Conv2d(16, 8, (1, 2), groups=2), torch.randn(9, 16, 5, 5)),
    ],
    ids=["linear", "convolution", "grouped"],
)
def test_the_error_is_that_of_the_layers_own_outputs_and_reconstruction_has_the_least(
    layer: nn.Module, x: Tensor
) -> None:
    weight = layer.get_parameter("weight")
    layer.get_parameter("bias").data.zero_()
    wanted = layer(x).detach()
    errors: dict[str, float] = {}
    for method in METHODS:
        pruned = prune_weight(weight.detach(), CAP, method, seen(layer, x))
        assert obeys(pruned.mask, 1, TWO_FOUR)
        assert obeys(pruned.weight, 1, TWO_FOUR)
        got = torch.func.functional_call(layer, {"weight": pruned.weight}, x).detach()
        assert pruned.error == pytest.approx(float((got - wanted).norm() / wanted.norm()), rel=1e-4)
        errors[method] = pruned.error or 0.0
    assert errors["reconstruction"] < errors["magnitude"]


def test_each_group_of_a_grouped_convolution_is_pruned_by_its_own_inputs() -> None:
    layer, x = nn.Conv2d(8, 4, 2, groups=2, bias=False), torch.randn(7, 8, 4, 4)
    whole = prune_weight(layer.weight.detach(), CAP, "reconstruction", seen(layer, x))
    for group in range(2):
        part = nn.Conv2d(4, 2, 2, bias=False)
        with torch.no_grad():
            part.weight.copy_(layer.weight[2 * group : 2 * group + 2])
        alone = prune_weight(
            part.weight.detach(), CAP, "reconstruction", seen(part, x[:, 4 * group : 4 * group + 4])
        )
        assert torch.equal(whole.mask[2 * group : 2 * group + 2], alone.mask)
        torch.testing.assert_close(whole.weight[2 * group : 2 * group + 2], alone.weight)


def test_without_statistics_only_magnitude_is_possible_and_tells_no_error() -> None:
    weight = torch.randn(4, 8)
    allowed = torch.rand(4, 8) < 0.6
    pruned = prune_weight(weight, CAP, "magnitude", allowed=allowed)
    assert pruned.error is None
    assert not (pruned.mask & ~allowed).any()
    transposed = prune_weight(weight.T, Cap(pattern=TWO_FOUR, axis=0), "magnitude", allowed=allowed.T)
    assert torch.equal(transposed.mask, pruned.mask.T)
    with pytest.raises(ValueError, match="activation needs statistics"):
        prune_weight(weight, CAP, "activation")


def test_the_worth_of_a_weight_is_its_size_times_that_of_its_input() -> None:
    layer, x = nn.Conv2d(4, 6, (2, 1), groups=2, bias=False), torch.randn(3, 4, 5, 2)
    worth = worth_of_weight(layer.weight.detach(), seen(layer, x))
    for o in range(6):
        for c in range(2):
            for place in range(2):
                channel = 2 * (o // 3) + c
                norm = x[:, channel, place : place + 4].norm()
                assert float(worth[o, c, place, 0]) == pytest.approx(
                    float(layer.weight[o, c, place, 0].detach().abs() * norm), rel=1e-5
                )


def test_an_unknown_method_is_told_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'magnitude'"):
        require_method("magnitud")
