from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from sparse_export.models.layers_csr import LinearCsr, WeightCsr, change_linears, why_not_linear

NAMES = ("0.weight", "2.weight")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Layers of this size only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _pair(
    bias: bool = True, density: float = 0.2
) -> tuple[nn.Sequential, nn.Sequential, dict[str, WeightCsr]]:
    """A masked network, its copy with changed layers, and their products with masks set."""
    torch.manual_seed(5)
    plain = nn.Sequential(nn.Linear(12, 9, bias=bias), nn.ReLU(inplace=True), nn.Linear(9, 7, bias=bias))
    masks = {name: torch.rand_like(plain.get_parameter(name)) < density for name in NAMES}
    with torch.no_grad():
        for name, mask in masks.items():
            plain.get_parameter(name).mul_(mask)
    changed = copy.deepcopy(plain)
    products = change_linears(changed, NAMES)
    for name, mask in masks.items():
        products[name].set_mask(mask)
    return plain, changed, products


def _gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs, and the gradient of the input."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("shape", [(6, 12), (2, 3, 12), (12,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_outputs_and_all_gradients_are_those_of_the_masked_network(
    shape: tuple[int, ...], bias: bool, density: float
) -> None:
    plain, changed, _ = _pair(bias, density)
    x = torch.randn(shape)
    for wanted, found in zip(_gradients(plain, x), _gradients(changed, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for name, value in plain.named_parameters():
        torch.testing.assert_close(changed.get_parameter(name).grad, value.grad, rtol=1e-4, atol=1e-5)


def test_active_weights_that_are_apart_have_the_gradients_of_the_masked_network() -> None:
    plain, changed, products = _pair()
    x = torch.randn(6, 12)
    apart = {name: product.take_apart() for name, product in products.items()}
    for wanted, found in zip(_gradients(plain, x), _gradients(changed, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for name, values in apart.items():
        mask = plain.get_parameter(name) != 0
        dense = plain.get_parameter(name).grad
        assert dense is not None
        torch.testing.assert_close(values.grad, dense[mask], rtol=1e-4, atol=1e-5)
        assert changed.get_parameter(name).grad is None


def test_a_saved_state_has_what_was_trained_apart() -> None:
    plain, changed, products = _pair()
    values = products["2.weight"].take_apart()
    with torch.no_grad():
        values.mul_(2)
    state = changed.state_dict()
    assert list(state) == list(plain.state_dict())
    assert torch.equal(state["2.weight"], 2 * plain.get_parameter("2.weight"))
    assert torch.equal(state["0.weight"], plain.get_parameter("0.weight"))


def test_layers_without_a_mask_multiply_densely() -> None:
    plain, changed, products = _pair()
    for product in products.values():
        product.set_mask(None)
    x = torch.randn(6, 12)
    assert torch.equal(changed(x), plain(x))


def test_a_layer_is_changed_once_and_stays_a_linear() -> None:
    plain, changed, products = _pair()
    again = change_linears(changed, NAMES)
    assert again == products
    assert [name for name, _ in changed.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert isinstance(changed[0], LinearCsr)
    assert isinstance(changed[0], nn.Linear)


def test_what_cannot_be_multiplied_so_has_a_reason() -> None:
    model = nn.Module()
    model.conv = nn.Conv2d(2, 2, 1)
    model.first = nn.Linear(4, 4)
    model.tied = nn.Linear(4, 4)
    model.tied.weight = model.first.weight
    model.short = nn.Linear(4, 4, dtype=torch.bfloat16)
    model.turned = nn.Linear(4, 4)
    model.turned.weight = nn.Parameter(torch.randn(4, 4).t())
    model.attention = nn.MultiheadAttention(4, 1)
    model.plain = nn.Linear(4, 4)
    reasons = {name: reason for name, reason in why_not_linear(model).items() if "bias" not in name}
    assert reasons == {
        "conv.weight": "Conv2d is no plain Linear layer",
        "first.weight": "two layers share it",
        "short.weight": "it is bfloat16 on cpu",
        "turned.weight": "it is not contiguous",
        "attention.in_proj_weight": "MultiheadAttention is no plain Linear layer",
        "attention.out_proj.weight": "NonDynamicallyQuantizableLinear is no plain Linear layer",
    }


def test_layers_inside_an_encoder_layer_of_torch_stay_as_they_are() -> None:
    reasons = why_not_linear(nn.TransformerEncoderLayer(8, 2, 16))
    assert "without the layer" in reasons["linear1.weight"]
