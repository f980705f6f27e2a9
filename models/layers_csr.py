"""Linear layers whose products leave inactive weights out, by CSR matrices on the CPU, changed in place.

A changed layer is still the layer that it was: the same parameters by the same names, the same checkpoints.
Beside them it has its active weights in one flat tensor while only these are trained.

Legend: N rows of activations, O outputs, I inputs of a product, K active weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparse_export.sparsity.csr import (
    CsrForm,
    csr_form,
    gather,
    gradient_at,
    multiply,
    multiply_transposed,
    scatter,
)

__all__ = ["LinearCsr", "WeightCsr", "change_linears", "why_not_linear"]


class WeightCsr:
    """A Linear's weight with its sparse form, and its product; dense until a mask is set.

    Attributes:
        weight: the layer's own parameter, contiguous.
        form: of its active entries, or None.
        values: the active entries as a parameter of their own, (K,), while only they are trained; `weight` is
            then out of date until `sync`. None: `weight` is trained, and has a gradient at every position.
        hook: of the layer's `state_dict()`.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self.form: CsrForm | None = None
        self.values: nn.Parameter | None = None
        self.hook: RemovableHandle | None = None

    def set_mask(self, mask: Tensor | None) -> None:
        """Use a mask; None makes the product dense. Not while only the active entries are trained."""
        assert self.values is None
        self.form = None if mask is None else csr_form(mask)

    @torch.no_grad()
    def take_apart(self) -> nn.Parameter:
        """Train only the active entries from now on, and return them, (K,)."""
        assert self.form is not None
        self.values = nn.Parameter(gather(self.form, self.weight))
        return self.values

    @torch.no_grad()
    def sync(self) -> None:
        """Write the active entries into the weight, where only they are trained."""
        if self.values is not None and self.form is not None:
            scatter(self.form, self.values, self.weight)

    def put_together(self) -> None:
        """Train the weight again from now on."""
        self.sync()
        self.values = None

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute x Wᵀ + bias along the last axis of x, (…, I) to (…, O)."""
        if self.form is None:
            return nn.functional.linear(x, self.weight, bias)
        x_IN = x.reshape(-1, x.shape[-1]).t()
        product: Callable[..., Tensor] = cast(Any, _Product.apply)
        if self.values is None:
            y_ON = product(x_IN, self.weight, bias, self.form, True)
        else:
            y_ON = product(x_IN, self.values, bias, self.form, False)
        return y_ON.t().reshape(*x.shape[:-1], y_ON.shape[0])


class _Product(torch.autograd.Function):
    """y = W x + bias by the active entries, features first.

    The caller transposes y, so that the next such layer gets its input features first without a copy.

    source: W itself, (O, I), where `whole`, with a gradient at every position; else the active entries (K,).
    """

    @staticmethod
    def forward(
        ctx: Any, x_IN: Tensor, source: Tensor, bias: Tensor | None, form: CsrForm, whole: bool
    ) -> Tensor:
        values = gather(form, source) if whole else source
        x_IN = x_IN.contiguous()
        y_ON = multiply(form, values, x_IN)
        if bias is not None:
            y_ON.add_(bias[:, None])
        ctx.save_for_backward(x_IN, values)
        ctx.form, ctx.whole = form, whole
        return y_ON

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x_IN, values = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        gy_ON = gradients[0].contiguous()
        gx = g_weight = g_bias = None
        if wants_x:
            gx = multiply_transposed(ctx.form, values, gy_ON)
        if wants_weight:
            g_weight = gy_ON @ x_IN.t() if ctx.whole else gradient_at(ctx.form, gy_ON, x_IN)
        if wants_bias:
            g_bias = gy_ON.sum(1)
        return gx, g_weight, g_bias, None, None


class LinearCsr(nn.Linear):
    """A Linear whose product goes by active weights."""

    product: WeightCsr

    def forward(self, input: Tensor) -> Tensor:
        return self.product(input, self.bias)


def why_not_linear(model: nn.Module) -> dict[str, str]:
    """Find the parameters by which CSR products cannot multiply.

    Args:
        model: the network.

    Returns:
        The reason for each, by name; parameters without one are weights of Linear layers.
    """
    reasons: dict[str, str] = {}
    owners: dict[int, int] = {}
    for module in model.modules():
        for value in module.parameters(recurse=False):
            owners[id(value)] = owners.get(id(value), 0) + 1
    for name, value in model.named_parameters():
        owner_name, _, own = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if type(owner) not in (nn.Linear, LinearCsr) or own != "weight":
            reasons[name] = f"{type(owner).__name__} is no plain Linear layer"
        elif owners[id(value)] > 1:
            reasons[name] = "two layers share it"
        elif value.device.type != "cpu" or value.dtype not in (torch.float32, torch.float64):
            reasons[name] = f"it is {str(value.dtype).removeprefix('torch.')} on {value.device.type}"
        elif not value.is_contiguous():
            reasons[name] = "it is not contiguous"
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer | nn.MultiheadAttention):
            for below, _ in module.named_parameters(prefix=name):
                reasons.setdefault(below, f"{type(module).__name__} may multiply by it without the layer")
    return reasons


def change_linears(model: nn.Module, names: Collection[str]) -> dict[str, WeightCsr]:
    """Change the Linear layers of some weights, in place.

    `state_dict()` of a changed layer syncs its weight first.

    Args:
        model: the network.
        names: weights for which `why_not_linear` has no reason.

    Returns:
        The weights by name, dense so far.
    """
    changed: dict[str, WeightCsr] = {}
    for name in names:
        owner = model.get_submodule(name.rpartition(".")[0])
        assert isinstance(owner, nn.Linear)
        product = getattr(owner, "product", None)
        if not isinstance(product, WeightCsr):
            product = WeightCsr(cast(nn.Parameter, owner.weight))
            object.__setattr__(owner, "__class__", LinearCsr)
            object.__setattr__(owner, "product", product)
            product.hook = owner.register_state_dict_pre_hook(_sync)
        changed[name] = product
    return changed


def _sync(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """The hook of `state_dict()`."""
    if isinstance(module, LinearCsr):
        module.product.sync()
