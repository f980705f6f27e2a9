"""The normalization of raw samples inside a graph gives what the graph gives behind it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from sparse_export.formats.preparation import FoldedPlace, RawType
from sparse_export.graph.example import example_of_shape
from sparse_export.graph.export import onnx_from_module
from sparse_export.graph.passes.fold_preprocess import with_folded_preprocess
from sparse_export.tasks.data import normalise

MEAN, STD = (0.485, 0.1, 0.9), (0.229, 0.3, 0.05)


class _TwoReaders(nn.Module):
    """A network that reads its input twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x).mean((2, 3)) + x.mean((1, 2, 3), keepdim=False)[:, None]
        return y


def _conv(**options: object) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3, **options), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))  # type: ignore[arg-type]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], FoldedPlace]] = {
    "no padding": (_conv, "weight and bias"),
    "no padding, no bias": (lambda: _conv(bias=False), "weight and bias"),
    "groups": (lambda: _conv(groups=3), "weight and bias"),
    "padding": (lambda: _conv(padding=1), "weight, behind a Sub"),
    "padding, no bias": (lambda: _conv(padding=1, bias=False), "weight, behind a Sub"),
    "flattened": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), "weight and bias"),
    "flattened, no bias": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5, bias=False)),
        "weight and bias",
    ),
    "pooled first": (
        lambda: nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(5)),
        "Sub and Mul",
    ),
    "two readers": (_TwoReaders, "Sub and Mul"),
}


def _graph(make: Callable[[], nn.Module]) -> tuple[nn.Module, onnx.ModelProto]:
    torch.manual_seed(1)
    module = make()
    module(torch.zeros(2, 3, 8, 8))
    module.eval()
    return module, onnx_from_module(module, example_of_shape((3, 8, 8)), masks={})


def _run(model: onnx.ModelProto, raw: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    found: np.ndarray = session.run(None, {model.graph.input[0].name: raw})[0]
    return found


def _weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("name", NETWORKS)
def test_raw_samples_give_what_normalized_ones_gave(name: str, dtype: RawType) -> None:
    make, place = NETWORKS[name]
    module, model = _graph(make)
    raw = np.random.default_rng(0).integers(0, 256, (7, 3, 8, 8), dtype=np.uint8)
    with torch.inference_mode():
        wanted = module(normalise(torch.from_numpy(raw), MEAN, STD)).numpy()
    before = model.SerializeToString(deterministic=True)
    found = with_folded_preprocess(model, levels=255, mean=MEAN, std=STD, dtype=dtype)
    assert model.SerializeToString(deterministic=True) == before
    assert found.place == place
    assert (found.weight == "") == (place == "Sub and Mul")
    np.testing.assert_allclose(_run(found.model, raw.astype(dtype)), wanted, atol=2e-5 * wanted.std())
    n_more = len(found.model.graph.node) - len(model.graph.node) - (dtype == "uint8")
    assert n_more == {"weight and bias": 0, "weight, behind a Sub": 1, "Sub and Mul": 2}[place]


@pytest.mark.parametrize("name", ["no padding", "padding", "flattened"])
def test_zeros_stay_zeros_and_nothing_becomes_one(name: str) -> None:
    torch.manual_seed(1)
    module, _ = _graph(NETWORKS[name][0])
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.mul_(torch.rand(parameter.shape) < 0.5).add_(0.0)
    model = onnx_from_module(module, example_of_shape((3, 8, 8)), masks={})
    found = with_folded_preprocess(model, levels=255, mean=MEAN, std=STD, dtype="float32")
    before, after = _weights(model)[found.weight], _weights(found.model)[found.weight]
    np.testing.assert_array_equal(before == 0, after == 0)
    assert not np.array_equal(before, after)
    assert not np.signbit(after[after == 0]).any()


def test_a_weight_that_would_underflow_is_left_alone() -> None:
    module, _ = _graph(_conv)
    with torch.no_grad():
        module.get_parameter("0.weight")[0, 0, 0, 0] = 1e-44
    model = onnx_from_module(module, example_of_shape((3, 8, 8)), masks={})
    found = with_folded_preprocess(model, levels=255, mean=MEAN, std=STD, dtype="float32")
    assert found.place == "Sub and Mul"
    np.testing.assert_array_equal(_weights(model)["0.weight"], _weights(found.model)["0.weight"])


def test_without_a_mean_a_padded_layer_needs_nothing_before_it() -> None:
    module, model = _graph(NETWORKS["padding"][0])
    found = with_folded_preprocess(model, levels=255, mean=(0.0,) * 3, std=STD, dtype="float32")
    assert found.place == "weight and bias"
    assert len(found.model.graph.node) == len(model.graph.node)
    raw = np.random.default_rng(0).integers(0, 256, (7, 3, 8, 8)).astype(np.float32)
    with torch.inference_mode():
        wanted = module(normalise(torch.from_numpy(raw) / 255, (0.0,) * 3, STD)).numpy()
    np.testing.assert_allclose(_run(found.model, raw), wanted, atol=2e-5 * wanted.std())


def test_a_bias_that_two_layers_share_is_changed_for_one() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)
            self.second.bias = self.first.bias

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.first(x).relu())
            return y

    torch.manual_seed(2)
    module = Shared().eval()
    model = onnx_from_module(module, example_of_shape((3,)), masks={})
    found = with_folded_preprocess(model, levels=1, mean=MEAN, std=STD, dtype="float32")
    assert found.place == "weight and bias"
    raw = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    with torch.inference_mode():
        wanted = module(normalise(torch.from_numpy(raw), MEAN, STD)).numpy()
    np.testing.assert_allclose(_run(found.model, raw), wanted, atol=2e-5 * wanted.std())
