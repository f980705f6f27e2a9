from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from sparse_export.errors import MissingCapability, UsageError
from sparse_export.models.layers24 import change_layers
from sparse_export.sparsity.pattern import NMPattern, largest_per_group
from sparse_export.sparsity.product24 import Backend
from sparse_export.sparsity.transposable import transposable_mask

REFERENCE: dict[str, Any] = {"dtype": torch.float32, "backend": "reference"}


def _masked(model: nn.Module, *, transposable: bool = False) -> dict[str, Tensor]:
    """Masks, 2:4 along the inputs, of every matrix that four divides; applied to the weights."""
    masks = {}
    for name, value in model.named_parameters():
        flat = value.detach().flatten(1) if value.ndim > 1 else value.detach()
        if flat.ndim == 2 and flat.shape[1] % 4 == 0 and (not transposable or flat.shape[0] % 4 == 0):
            mask = (
                transposable_mask(flat) if transposable else largest_per_group(flat, 1, NMPattern(n=2, m=4))
            )
            masks[name] = mask.view(value.shape)
            with torch.no_grad():
                value.mul_(masks[name])
    return masks


def _changed(model: nn.Module, masks: dict[str, Tensor], **options: Any) -> nn.Module:
    """A copy of the model whose products are 2:4."""
    twin = copy.deepcopy(model)
    layers, reasons = change_layers(twin, masks, **REFERENCE)
    assert (set(layers), reasons) == (set(masks), {})
    for name, layer in layers.items():
        layer.set_mask(masks[name], **options)
    return twin


def _gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    assert x.grad is not None
    found = {"output": y.detach(), "input": x.grad}
    for name, value in model.named_parameters():
        assert value.grad is not None
        found[name] = value.grad.clone()
    return found


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 12, 1)
        self.second = nn.Conv2d(12, 4, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x).relu())
        return result


class SelfAttention(nn.Module):
    def __init__(self, *, batch_first: bool = True) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 4, batch_first=batch_first)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        result: Tensor = self.inner(x, x, x, need_weights=False, attn_mask=mask)[0]
        return result


def _cases() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(1)
    return {
        "linear": (nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8)), torch.randn(2, 5, 16)),
        "convolution": (Convolutions(), torch.randn(3, 8, 6, 5)),
        "channels_last": (
            Convolutions(),
            torch.randn(3, 8, 6, 6).contiguous(memory_format=torch.channels_last),
        ),
        "attention": (SelfAttention(), torch.randn(3, 7, 16)),
        "attention, tokens first": (SelfAttention(batch_first=False), torch.randn(7, 3, 16)),
    }


@pytest.mark.parametrize("sparse_backward", [False, True])
@pytest.mark.parametrize("case", list(_cases()))
def test_outputs_and_every_gradient_are_those_of_the_masked_dense_layer(
    case: str, sparse_backward: bool
) -> None:
    model, x = _cases()[case]
    masks = _masked(model, transposable=sparse_backward)
    wanted, found = (
        _gradients(one, x) for one in (model, _changed(model, masks, sparse_backward=sparse_backward))
    )
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_gradients_agree_with_finite_differences_in_float64() -> None:
    layer = nn.Linear(8, 8).double()
    masks = _masked(layer, transposable=True)
    layers, _ = change_layers(layer, masks, dtype=torch.float64, backend="reference")
    layers["weight"].set_mask(masks["weight"], sparse_backward=True)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_gradients_of_inactive_weights_are_there_for_growth() -> None:
    layer = nn.Linear(8, 4)
    masks = _masked(layer)
    found = _gradients(_changed(layer, masks), torch.randn(5, 8))
    assert (found["weight"][~masks["weight"]] != 0).any()


def test_under_autocast_a_layer_gives_what_the_dense_one_gives() -> None:
    model, x = _cases()["linear"]
    masks = _masked(model)
    twin = copy.deepcopy(model)
    layers, _ = change_layers(twin, masks, dtype=torch.bfloat16, backend="reference")
    for name, layer in layers.items():
        layer.set_mask(masks[name])
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = model(x), twin(x)
        assert found.dtype == wanted.dtype == torch.bfloat16
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    found.float().sum().backward()
    weight = twin.get_parameter("0.weight")
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_names_parameters_and_checkpoints_stay_what_they_were() -> None:
    model, _ = _cases()["attention"]
    masks = _masked(model)
    before = dict(model.named_parameters())
    change_layers(model, masks, **REFERENCE)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() == model.state_dict().keys()
    assert all(before[name] is after[name] for name in before)
    model.load_state_dict(copy.deepcopy(model.state_dict()))


def test_a_new_mask_is_put_into_the_memory_of_the_old_forms() -> None:
    layer = nn.Linear(8, 8)
    layers, _ = change_layers(layer, ["weight"], **REFERENCE)
    product = layers["weight"]
    pointers = set()
    x = torch.randn(3, 8)
    for seed in range(3):
        scores = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))
        mask = largest_per_group(scores, 1, NMPattern(n=2, m=4))
        with torch.no_grad():
            layer.weight.copy_(scores * mask)
        product.set_mask(mask)
        assert product.forward_form is not None
        pointers.add(product.forward_form.packed.data_ptr())
        torch.testing.assert_close(layer(x), nn.functional.linear(x, scores * mask, layer.bias))
    assert len(pointers) == 1
    product.set_mask(None)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_a_backward_pass_after_new_values_is_refused_by_autograd() -> None:
    layer = nn.Linear(8, 8)
    masks = _masked(layer, transposable=True)
    layers, _ = change_layers(layer, masks, **REFERENCE)
    layers["weight"].set_mask(masks["weight"], sparse_backward=True)
    y = layer(torch.randn(2, 8, requires_grad=True))
    layers["weight"].fill()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_vision_transformer_computes_what_it_did() -> None:
    model = VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=12
    ).eval()
    nn.init.normal_(model.heads.head.weight)
    names = [name for name, value in model.named_parameters() if value.ndim == 2]
    masks = {name: mask for name, mask in _masked(model).items() if name in names}
    twin = _changed(model, masks)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-5)
    assert sum("in_proj_weight" in name for name in masks) == 2


@pytest.mark.parametrize("boolean", [True, False])
def test_attention_masks_mean_the_same(boolean: bool) -> None:
    model = SelfAttention().eval()
    twin = _changed(model, _masked(model))
    later = torch.ones(7, 7, dtype=torch.bool).triu(1)
    mask = later if boolean else torch.zeros(7, 7).masked_fill(later, float("-inf"))
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(twin(x, mask), model(x, mask), rtol=1e-4, atol=1e-5)


def test_what_attention_cannot_do_it_refuses() -> None:
    model = SelfAttention()
    layer: Any = _changed(model, _masked(model)).get_submodule("inner")
    x = torch.randn(2, 7, 16)
    with pytest.raises(UsageError, match="its weights"):
        layer(x, x, x)
    with pytest.raises(UsageError, match="self-attention"):
        layer(x, x.clone(), x, need_weights=False)


def test_torch_compile_traces_a_changed_layer_whole() -> None:
    model, x = _cases()["linear"]
    masks = _masked(model, transposable=True)
    twin = _changed(model, masks, sparse_backward=True)
    wanted = _gradients(twin, x)
    twin.zero_grad()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    found = _gradients(_Wrapped(compiled, twin), x)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


class _Wrapped(nn.Module):
    """A compiled network with the names of the one inside."""

    def __init__(self, compiled: Any, inner: nn.Module) -> None:
        super().__init__()
        self._compiled = [compiled]
        for name, module in inner.named_children():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self._compiled[0](x)
        return result


class Odd(nn.Module):
    """One of each that cannot be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(8, 8, 3)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.padded = nn.Conv2d(8, 8, 1, padding=1)
        self.narrow = nn.Linear(6, 8)
        self.table = nn.Embedding(8, 8)
        self.apart = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
        self.layer = nn.TransformerEncoderLayer(8, 2, 8)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("wide.weight", "3x3 convolution"),
        ("grouped.weight", "groups or padding"),
        ("padded.weight", "groups or padding"),
        ("narrow.weight", "6 inputs"),
        ("table.weight", "Embedding"),
        ("apart.q_proj_weight", "projection of its own"),
        ("apart.out_proj.weight", "stays as it is"),
        ("layer.linear1.weight", "TransformerEncoderLayer"),
        ("layer.self_attn.in_proj_weight", "TransformerEncoderLayer"),
    ],
)
def test_what_cannot_be_changed_is_told_why(name: str, reason: str) -> None:
    layers, reasons = change_layers(Odd(), [name], **REFERENCE)
    assert layers == {}
    assert reason in reasons[name]


def test_unknown_names_and_absent_devices_are_refused() -> None:
    with pytest.raises(UsageError, match="'nothing'"):
        change_layers(nn.Linear(8, 8), ["nothing"], **REFERENCE)
    with pytest.raises(MissingCapability, match="on cpu"):
        change_layers(nn.Linear(64, 64), ["weight"], dtype=torch.float16, backend="cutlass")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cutlass", "cusparselt"])
def test_on_a_card_outputs_and_gradients_are_those_of_the_masked_dense_layer(backend: Backend) -> None:
    if backend == "cutlass" and torch.cuda.get_device_capability()[0] != 8:
        pytest.skip("torch has no such product by CUTLASS for this card")
    model = nn.Linear(256, 128).cuda()
    masks = _masked(model, transposable=True)
    twin = copy.deepcopy(model)
    layers, _ = change_layers(twin, masks, dtype=torch.bfloat16, backend=backend)
    layers["weight"].set_mask(masks["weight"], sparse_backward=True)
    x = torch.randn(197, 256, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        wanted, found = _gradients(model, x), _gradients(twin, x)
    for name, value in wanted.items():
        scale = float(value.float().abs().max())
        torch.testing.assert_close(found[name].float(), value.float(), rtol=0, atol=3e-2 * scale)
