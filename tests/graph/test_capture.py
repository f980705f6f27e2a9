"""A network is captured for every batch size, or its branch on the batch size is named."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from sparse_export.errors import UsageError
from sparse_export.graph.capture import captured
from sparse_export.graph.example import example_of_shape
from sparse_export.graph.export import onnx_from_module
from sparse_export.graph.named_network import NamedNetwork

Forward = Callable[["Network", Tensor], Any]


class Network(nn.Module):
    """Two layers and a forward of the test's own, on (batch, 2, 4)."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.run = forward
        self.first, self.other = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.run(self, x)
        return logits


def more_than_one(net: Network, x: Tensor) -> Any:
    return net.first(x.flatten(1)) if x.size(0) > 1 else net.other(x.flatten(1))


def exactly_one(net: Network, x: Tensor) -> Any:
    return net.other(x.flatten(1)) if x.shape[0] == 1 else net.first(x.flatten(1))


def more_than_four(net: Network, x: Tensor) -> Any:
    return net.other(x.flatten(1)) if x.shape[0] > 4 else net.first(x.flatten(1))


def even(net: Network, x: Tensor) -> Any:
    return net.first(x.flatten(1)) if x.shape[0] % 2 == 0 else net.other(x.flatten(1))


def by_length(net: Network, x: Tensor) -> Any:
    return net.other(x.flatten(1)) if len(x) > 4 else net.first(x.flatten(1))


def fixed(net: Network, x: Tensor) -> Any:
    return net.first(x.reshape(2, 8))


@pytest.mark.parametrize(
    ("forward", "traced_for", "false_at"),
    [
        (more_than_one, "batch > 1", 1),
        (exactly_one, "batch != 1", 1),
        (more_than_four, "batch <= 4", 5),
        (even, "(batch % 2) == 0", 1),
        (by_length, "batch <= 4", 5),
        (fixed, "(8*batch) == 16", 1),
    ],
)
def test_a_branch_on_the_batch_size_is_refused_and_named(
    forward: Forward, traced_for: str, false_at: int
) -> None:
    with pytest.raises(UsageError) as caught:
        captured(NamedNetwork(Network(forward).eval(), example_of_shape((2, 4))))
    line = inspect.getsourcelines(forward)[1] + 1
    assert f"Network depends on the batch size at test_capture.py, line {line} (`return" in caught.value.what
    assert caught.value.what.endswith(f"traced for {traced_for}, which is false at batch {false_at}.")


def test_export_refuses_such_a_branch_in_the_same_words() -> None:
    with pytest.raises(UsageError, match=r"traced for batch > 1, which is false at batch 1"):
        onnx_from_module(Network(more_than_one), example_of_shape((2, 4)), masks={})


def length(net: Network, x: Tensor) -> Any:
    return net.first(x.view(len(x), -1))


def checked(net: Network, x: Tensor) -> Any:
    assert x.shape[0] >= 1
    return net.first(x.flatten(1))


@pytest.mark.parametrize("forward", [length, checked])
def test_a_forward_that_takes_every_batch_size_is_exported_for_each(
    forward: Forward, capfd: pytest.CaptureFixture[str]
) -> None:
    module = Network(forward).eval()
    model = onnx_from_module(module, example_of_shape((2, 4)), masks={})
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for n in (1, 2, 5):
        x = torch.randn(n, 2, 4, generator=torch.Generator().manual_seed(n))
        with torch.no_grad():
            wanted = module(x).numpy()
        np.testing.assert_allclose(session.run(None, {"input": x.numpy()})[0], wanted, atol=1e-5)
    assert "first.weight" in {tensor.name for tensor in model.graph.initializer}
    assert capfd.readouterr() == ("", "")


class Attention(nn.Module):
    """Its operators ask whether the batch is 1, to choose strides.

    With `len(x)` it is traced by TorchDynamo.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(x).reshape(len(x), -1))
        return logits


class Recurrent(nn.Module):
    """Its operator asks whether the batch is 1 as well."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.cell(x)[0][:, -1]
        return logits


@pytest.mark.parametrize("make", [Attention, Recurrent])
def test_what_operators_ask_of_the_batch_size_is_no_branch(make: Callable[[], nn.Module]) -> None:
    module = make().eval()
    model = onnx_from_module(module, example_of_shape((2, 4)), masks={})
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for n in (1, 3):
        x = torch.randn(n, 2, 4, generator=torch.Generator().manual_seed(n))
        with torch.no_grad():
            wanted = module(x).numpy()
        np.testing.assert_allclose(session.run(None, {"input": x.numpy()})[0], wanted, atol=1e-5)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_forward_is_told_that_it_is_exported_to_onnx() -> None:
    told = []

    def asks(net: Network, x: Tensor) -> Any:
        told.append(torch.onnx.is_in_onnx_export())
        return net.first(x.flatten(1))

    network = NamedNetwork(Network(asks).eval(), example_of_shape((2, 4)))
    told.clear()
    captured(network)
    assert set(told) == {True}
    assert not torch.onnx.is_in_onnx_export()
