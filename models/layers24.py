"""Layers whose products are 2:4: a Linear, a 1 x 1 convolution and self-attention, changed in place.

A changed layer is still the layer that it was: the same parameters by the same names, the same checkpoints.
It also owns compressed forms of its weight, which `set_mask` makes once for a mask and `fill` fills with
values.

Legend: B batch, T tokens, E width, N rows of activations, O outputs, I inputs of a product.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sparse_export.errors import UsageError
from sparse_export.models.search24 import best_algorithms
from sparse_export.sparsity.product24 import (
    DEFAULT,
    Backend,
    Compressed,
    compress,
    fill,
    multiply,
    multiply_integers,
    quantized_rows,
    require_backend,
    why_not,
)

__all__ = ["Weight24", "change_layers", "choose_algorithms", "restore_layers", "tune_layers"]


class Weight24:
    """A weight's compressed forms, and its product; dense until a mask is set.

    Args:
        weight: the layer's own parameter, which gradients go to.
        dtype: of the product. int8 is for inference: weights are quantized by outputs when forms are filled,
            activations by rows at every call, both symmetric, and nothing is calibrated.
        backend: of the product.

    Attributes:
        forward_form: of the weight (O, I); None for a dense product.
        backward_form: of its transpose, for the gradient of the input; None leaves that product dense.
        algorithm: of the forward product.
        backward_algorithm: of the other.
        paused: multiply densely for now.
        n_rows: rows that the algorithms were chosen for, None before.
        was: the class of the layer before it was changed.
    """

    def __init__(self, weight: Tensor, *, dtype: torch.dtype, backend: Backend) -> None:
        self.forward_form: Compressed | None = None
        self.backward_form: Compressed | None = None
        self.algorithm = self.backward_algorithm = DEFAULT
        self.paused = False
        self.n_rows: int | None = None
        self.dtype, self.backend = dtype, backend
        self.was: type[nn.Module] | None = None
        self._weight = weight
        self._scale_O: Tensor | None = None

    def set_mask(self, mask: Tensor | None, *, sparse_backward: bool = False) -> None:
        """Compress the weight for a mask. Existing forms are overwritten: a CUDA graph may read them.

        Args:
            mask: of the weight's shape, True = kept; None makes the product dense.
            sparse_backward: compress the transpose too.

        Raises:
            UsageError: the mask is not 2:4, or with sparse_backward not transposable.
        """
        if mask is None:
            self.forward_form = self.backward_form = None
            return
        mask_OI = mask.flatten(1)
        self.forward_form = _put(self.forward_form, compress(mask_OI, self.dtype, self.backend))
        self.backward_form = (
            _put(self.backward_form, compress(mask_OI, self.dtype, self.backend, transposed=True))
            if sparse_backward
            else None
        )
        self.fill()

    def fill(self) -> None:
        """Gather the weight's values into the forms; they have to be zero where the mask is False."""
        if self.dtype == torch.int8 and self.forward_form is not None:
            integers, self._scale_O = quantized_rows(self._weight.detach().flatten(1))
            fill(self.forward_form, integers)
            return
        for form in (self.forward_form, self.backward_form):
            if form is not None:
                fill(form, self._weight)

    @property
    def weight(self) -> Tensor:
        """The layer's own parameter."""
        return self._weight

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute x Wᵀ + bias as `torch.nn.functional.linear` does, under autocast or not.

        Args:
            x: (…, I).
            weight: the parameter, or a view (O, I) of it.
            bias: (O,), or None.

        Returns:
            (…, O).
        """
        form, back = self.forward_form, self.backward_form
        if form is None or self.paused:
            return nn.functional.linear(x, weight, bias)
        rows_NI = x.reshape(-1, x.shape[-1])
        if self.dtype == torch.int8:
            return self._multiply_int8(rows_NI, form, bias).reshape(*x.shape[:-1], form.shape[0])
        product: Callable[..., Tensor] = cast(Any, _Product.apply)
        y_NO = product(
            rows_NI,
            weight,
            bias,
            form.packed,
            form.meta,
            None if back is None else back.packed,
            None if back is None else back.meta,
            self.backend,
            self.algorithm,
            self.backward_algorithm,
        )
        if not torch.is_autocast_enabled(x.device.type):
            y_NO = y_NO.to(x.dtype)
        return y_NO.reshape(*x.shape[:-1], y_NO.shape[-1])

    def _multiply_int8(self, x_NI: Tensor, form: Compressed, bias: Tensor | None) -> Tensor:
        """The product of quantized rows and weights, (N, O), in the dtype of x."""
        assert self._scale_O is not None
        integers, scale_N = quantized_rows(x_NI)
        y = multiply_integers(
            integers,
            form.packed,
            form.meta,
            shape=form.shape,
            backend=self.backend,
            algorithm=self.algorithm,
        )
        scaled = y.float() * scale_N[:, None] * self._scale_O
        return (scaled if bias is None else scaled + bias.float()).to(x_NI.dtype)


def _put(old: Compressed | None, new: Compressed) -> Compressed:
    """The new form, in the old one's memory where there is one."""
    if old is None:
        return new
    old.packed.copy_(new.packed)
    old.places.copy_(new.places)
    if old.meta is not None and new.meta is not None:
        old.meta.copy_(new.meta)
    return replace(old)


class _Product(torch.autograd.Function):
    """y = x Wᵀ + bias by the compressed weight; the weight's gradient is dense, since growth needs all of it.

    Autograd checks saved tensors: a backward pass after the forms were filled again raises RuntimeError.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        weight_OI: Tensor,
        bias: Tensor | None,
        packed: Tensor,
        meta: Tensor | None,
        packed_t: Tensor | None,
        meta_t: Tensor | None,
        backend: Backend,
        algorithm: int,
        backward_algorithm: int,
    ) -> Tensor:
        shape = (weight_OI.shape[0], weight_OI.shape[1])
        with torch.autocast(x_NI.device.type, enabled=False):
            x = x_NI.to(packed.dtype)
            b = None if bias is None else bias.to(packed.dtype)
            y = multiply(x, packed, meta, b, shape=shape, backend=backend, algorithm=algorithm)
        ctx.save_for_backward(x, weight_OI, packed_t, meta_t)
        ctx.backend, ctx.shape, ctx.algorithm = backend, shape, backward_algorithm
        ctx.dtypes = (x_NI.dtype, None if bias is None else bias.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight_OI, packed_t, meta_t = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        x_type, bias_type = ctx.dtypes
        gy = gradients[0].to(x.dtype)
        gx = gw = gb = None
        with torch.autocast(x.device.type, enabled=False):
            if wants_x and packed_t is not None:
                n_out, n_in = ctx.shape
                gx = multiply(
                    gy,
                    packed_t,
                    meta_t,
                    None,
                    shape=(n_in, n_out),
                    backend=ctx.backend,
                    algorithm=ctx.algorithm,
                ).to(x_type)
            elif wants_x:
                gx = (gy @ weight_OI.to(gy.dtype)).to(x_type)
            if wants_weight:
                gw = (gy.T @ x).to(weight_OI.dtype)
            if wants_bias and bias_type is not None:
                gb = gy.sum(0, dtype=torch.float32).to(bias_type)
        return gx, gw, gb, None, None, None, None, None, None, None


class Linear24(nn.Linear):
    """A Linear whose product is 2:4."""

    product: Weight24

    def forward(self, input: Tensor) -> Tensor:
        return self.product(input, self.weight, self.bias)


class Pointwise24(nn.Conv2d):
    """A 1 x 1 convolution as a 2:4 product over pixels; channels_last inputs are not copied."""

    product: Weight24

    def forward(self, input: Tensor) -> Tensor:
        down, right = self.stride
        x_BHWC = input[:, :, ::down, ::right].permute(0, 2, 3, 1)
        return self.product(x_BHWC, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class Attention24(nn.MultiheadAttention):
    """Self-attention whose projections are 2:4; UsageError for anything that it cannot compute."""

    product: Weight24

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        if query is not key or key is not value or query.ndim != 3:
            raise _unsupported("called for something else than self-attention over a batch")
        if need_weights or key_padding_mask is not None:
            raise _unsupported("called for its weights, or with a padding mask")
        x_BTE = query if self.batch_first else query.transpose(0, 1)
        n_batch, n_tokens, width = x_BTE.shape
        packed = self.product(x_BTE, self.in_proj_weight, self.in_proj_bias)
        q, k, v = packed.view(n_batch, n_tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask  # True excludes in MultiheadAttention, and includes in the function below
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.view(n_batch, self.num_heads, n_tokens, n_tokens)
        y = nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=attn_mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal and attn_mask is None,
        )
        y_BTE = self.out_proj(y.transpose(1, 2).reshape(n_batch, n_tokens, width))
        return (y_BTE if self.batch_first else y_BTE.transpose(0, 1)), None


def _unsupported(what: str) -> UsageError:
    """The error for a call that a 2:4 attention layer cannot compute."""
    return UsageError(
        f"A 2:4 attention layer was {what}.",
        expected="It computes layer(x, x, x, need_weights=False) alone.",
        do="Leave this attention layer dense.",
    )


def change_layers(
    model: nn.Module,
    masks: Mapping[str, Tensor] | Collection[str],
    *,
    dtype: torch.dtype,
    backend: Backend,
) -> tuple[dict[str, Weight24], dict[str, str]]:
    """Change, in place, the layers of some weights that can be multiplied as 2:4.

    Args:
        model: the network.
        masks: names of weights, as `named_parameters()` has them.
        dtype: of the products.
        backend: of the products.

    Returns:
        The weights by name, dense so far, and the reason for each weight that stays as it is, both in the
        model's order.

    Raises:
        UsageError: the model has no such weight, or there is no such backend.
        MissingCapability: the model's device has no such product.
    """
    parameters = dict(model.named_parameters())
    unknown = [name for name in masks if name not in parameters]
    if unknown:
        raise UsageError(f"The network has no parameter {unknown[0]!r}.", do="Give names of its weights.")
    first = next(iter(parameters.values()), None)
    if first is not None:
        require_backend(backend, first.device)
    hidden = _hidden(model)
    changed: dict[str, Weight24] = {}
    reasons: dict[str, str] = {}
    for name in (name for name in parameters if name in masks):
        owner_name, _, own = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        weight = parameters[name]
        reason = hidden.get(owner_name) or _why_not_layer(owner, own)
        reason = reason or why_not(tuple(weight.flatten(1).shape), dtype, backend)
        if reason is not None:
            reasons[name] = reason
            continue
        changed[name] = _change(owner, weight, dtype, backend)
        if own == "weight" and owner_name.endswith("out_proj"):
            around = model.get_submodule(owner_name.rpartition(".")[0])
            if type(around) is nn.MultiheadAttention:
                _change(around, around.in_proj_weight, dtype, backend)
    return changed, reasons


def _hidden(model: nn.Module) -> dict[str, str]:
    """Layers by whose weights an outer module multiplies without calling them, with the reason."""
    reasons = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            for below, _ in module.named_modules(prefix=name):
                reasons[below] = (
                    "torch's TransformerEncoderLayer multiplies by it without the layer in inference"
                )
        if isinstance(module, nn.MultiheadAttention) and _why_not_layer(module, "in_proj_weight"):
            reasons[f"{name}.out_proj".lstrip(".")] = "its attention layer stays as it is"
    return reasons


def _why_not_layer(owner: nn.Module, own: str) -> str | None:
    """Why a layer cannot be changed, by its class; None where it can."""
    if type(owner) in (nn.Linear, NonDynamicallyQuantizableLinear) and own == "weight":
        return None
    if type(owner) is nn.Conv2d and own == "weight":
        if owner.kernel_size != (1, 1):
            size = "x".join(map(str, owner.kernel_size))
            return f"it is a {size} convolution; only 1x1 ones are products as they are"
        if owner.groups != 1 or owner.padding not in ((0, 0), "valid"):
            return "it is a 1x1 convolution with groups or padding"
        return None
    if type(owner) is nn.MultiheadAttention or type(owner) is Attention24:
        if own != "in_proj_weight" or owner.in_proj_weight is None:
            return "its attention layer has a projection of its own for queries, keys or values"
        if owner.bias_k is not None or owner.add_zero_attn:
            return "its attention layer adds keys of its own"
        return None
    return f"{type(owner).__name__} is no kind of layer that can be changed"


def _change(owner: nn.Module, weight: Tensor, dtype: torch.dtype, backend: Backend) -> Weight24:
    """Change the class of a layer to one of the above; it keeps all that it has."""
    kinds: tuple[tuple[type[nn.Module], type[nn.Module]], ...] = (
        (nn.MultiheadAttention, Attention24),
        (nn.Conv2d, Pointwise24),
        (nn.Linear, Linear24),
    )
    product = getattr(owner, "product", None)
    if isinstance(product, Weight24):
        return product
    product = Weight24(weight, dtype=dtype, backend=backend)
    product.was = type(owner)
    object.__setattr__(owner, "__class__", next(new for old, new in kinds if isinstance(owner, old)))
    object.__setattr__(owner, "product", product)
    return product


def restore_layers(model: nn.Module) -> None:
    """Change every changed layer back, in place; weights stay as they are.

    Args:
        model: the network.
    """
    for module in model.modules():
        product = getattr(module, "product", None)
        if isinstance(product, Weight24) and product.was is not None:
            object.__delattr__(module, "product")
            object.__setattr__(module, "__class__", product.was)


def tune_layers(model: nn.Module, layers: Mapping[str, Weight24], run: Callable[[], object]) -> None:
    """Choose the fastest algorithms for each layer's rows in one run of the model. This times the device.

    Args:
        model: the network.
        layers: of `change_layers`.
        run: calls the model, not compiled, on inputs of the later size.
    """
    rows: dict[str, int] = {}
    handles = [
        model.get_submodule(name.rpartition(".")[0]).register_forward_hook(_row_counter(rows, name))
        for name in layers
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    for name, n_rows in rows.items():
        layers[name].n_rows = n_rows
    choose_algorithms([layers[name] for name in rows])


def choose_algorithms(layers: Collection[Weight24]) -> None:
    """Choose the fastest algorithms of existing forms, for the rows that each layer was tuned for.

    Args:
        layers: of `change_layers`; those without forms or rows are left as they are.
    """
    forward = [(layer, layer.forward_form) for layer in layers if layer.n_rows and layer.forward_form]
    backward = [(layer, layer.backward_form) for layer in layers if layer.n_rows and layer.backward_form]
    if not forward:
        return
    first = forward[0][1]
    found = best_algorithms(
        [(form.shape, layer.n_rows or 0) for layer, form in (*forward, *backward)],
        first.packed.dtype,
        first.backend,
        first.packed.device,
    )
    for (layer, _), algorithm in zip(forward, found, strict=False):
        layer.algorithm = algorithm
    for (layer, _), algorithm in zip(backward, found[len(forward) :], strict=True):
        layer.backward_algorithm = algorithm


def _row_counter(rows: dict[str, int], name: str) -> Any:
    """A hook that notes the rows of a layer's product."""

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        channels = first.shape[1] if isinstance(module, nn.Conv2d) else first.shape[-1]
        rows[name] = first.numel() // channels

    return count
