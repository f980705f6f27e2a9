"""Networks whose layers get their shapes from an input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sparse_export.errors import UsageError
from sparse_export.models.lazy import give_shapes
from sparse_export.models.weights import load_weights


def lazy() -> nn.Sequential:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3))


def test_layers_get_the_shapes_that_one_sample_gives_them_and_nothing_else_changes() -> None:
    model = lazy().train()
    give_shapes(model, (2, 6, 6))
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters() if value.ndim > 1}
    assert shapes == {"0.weight": (4, 2, 3, 3), "3.weight": (3, 64)}
    assert model.training
    before = {name: value.clone() for name, value in model.state_dict().items()}
    give_shapes(model, (99,))  # is not run any more
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.state_dict()["1.num_batches_tracked"] == 0


def test_an_input_that_the_network_cannot_take_is_told() -> None:
    with pytest.raises(UsageError, match=r"cannot take inputs of shape \(2, 1, 1\)"):
        give_shapes(lazy(), (2, 1, 1))


def test_a_layer_that_the_input_does_not_reach_is_told() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.LazyLinear(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(UsageError, match=r"unused\.weight, unused\.bias of Unused have no shape yet"):
        give_shapes(Unused(), (4,))


def test_a_file_of_weights_does_not_go_into_layers_without_shapes(tmp_path: Path) -> None:
    save_file({"0.weight": torch.zeros(3, 4), "0.bias": torch.zeros(3)}, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=r"0\.weight, 0\.bias of Sequential have no shape yet"):
        load_weights(nn.Sequential(nn.LazyLinear(3)), tmp_path / "w.safetensors")
