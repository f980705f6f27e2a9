"""The products of a network for a layer plan: sizes, rows at a batch, and the magnitude that 2:4 drops.

Legend: O outputs, I inputs, N rows of a product.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_export.errors import UsageError
from sparse_export.graph.passes.permute import reduction_axis
from sparse_export.models.layers24 import change_layers
from sparse_export.sparsity import capped_layers
from sparse_export.sparsity.compressed import TWO_FOUR
from sparse_export.sparsity.pattern import largest_per_group
from sparse_export.sparsity.product24 import Backend, why_not
from sparse_export.train.layers import maskable_parameters, output_layers

__all__ = ["Product", "products_of"]

_N_SAMPLES = 2  # samples: batch norm refuses one alone


@dataclass(frozen=True, kw_only=True)
class Product:
    """The product by one weight (O, I).

    Attributes:
        name: of the weight.
        n_outputs: O.
        n_inputs: I.
        n_rows: N at the requested batch; None where no forward pass multiplies by it.
        lost: share of sum |w| over all these weights that 2:4 drops from this one; None where it cannot be
            2:4.
        reason: why its product cannot be 2:4; None when it can.
    """

    name: str
    n_outputs: int
    n_inputs: int
    n_rows: int | None
    lost: float | None
    reason: str | None


def products_of(
    model: nn.Module, input_shape: Sequence[int], batch: int, dtype: torch.dtype, backend: Backend
) -> tuple[Product, ...]:
    """List the products by all weights that sparse training may mask.

    Sizes are found on the `meta` device, where nothing is computed.

    Args:
        model: the network, not changed.
        input_shape: of one sample.
        batch: samples in a call.
        dtype: of the products.
        backend: of the 2:4 products.

    Returns:
        The products in the model's order.

    Raises:
        UsageError: the network cannot take the shape.
    """
    weights = maskable_parameters(model)
    rows, outputs = _rows(model, input_shape)
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    _, reasons = capped_layers(
        shapes,
        {name: reduction_axis(model, name) for name in shapes},
        TWO_FOUR,
        outputs=outputs,
        keep_dense=set(),
        small_share=0.0,
    )
    changed = copy.deepcopy(model)
    _, unchanged = change_layers(changed, list(weights), dtype=dtype, backend="reference")
    total = sum(float(value.detach().abs().sum(dtype=torch.float64)) for value in weights.values())
    found = []
    for name, value in weights.items():
        matrix = value.detach().flatten(1)
        shape = (matrix.shape[0], matrix.shape[1])
        reason = reasons.get(name) or unchanged.get(name) or why_not(shape, dtype, backend)
        if reason is None and name not in rows:
            reason = "no forward pass multiplies by it"
        found.append(
            Product(
                name=name,
                n_outputs=shape[0],
                n_inputs=shape[1],
                n_rows=None if name not in rows else batch * rows[name] // _N_SAMPLES,
                lost=_dropped(matrix) / total if reason is None and total > 0 else None,
                reason=reason,
            )
        )
    return tuple(found)


def _dropped(matrix: Tensor) -> float:
    """The sum |w| that 2:4 drops."""
    kept = largest_per_group(matrix, 1, TWO_FOUR)
    return float((matrix.abs() * ~kept).sum(dtype=torch.float64))


def _rows(model: nn.Module, input_shape: Sequence[int]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Rows of each product for two samples, and the weights of the output layers."""
    on_meta = copy.deepcopy(model).to("meta").train()
    rows: dict[str, int] = {}
    handles = []
    for owner, module in on_meta.named_modules():
        names = [f"{owner}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)]
        if isinstance(module, nn.MultiheadAttention):
            names += [f"{owner}.out_proj.weight".lstrip(".")]
        handles.append(module.register_forward_hook(_counter(rows, names)))

    def forward() -> Any:
        return on_meta(torch.zeros((_N_SAMPLES, *input_shape), device="meta"))

    try:
        outputs = output_layers(on_meta, forward)
    except Exception as cause:  # whatever a network raises
        reason = next(iter(str(cause).splitlines()), type(cause).__name__)
        raise UsageError(
            f"The network cannot take inputs of shape {tuple(input_shape)}: {reason}.",
            do="Give the shape that it was made for.",
        ) from cause
    finally:
        for handle in handles:
            handle.remove()
    return rows, outputs


def _counter(rows: dict[str, int], names: Sequence[str]) -> Any:
    """A hook that adds a layer's rows to those of its weights."""

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if not isinstance(first, Tensor) or first.ndim == 0:
            return
        width = first.shape[1] if isinstance(module, nn.Conv2d) else first.shape[-1]
        n_rows = math.prod(first.shape) // max(1, width)
        for name in names:
            rows[name] = rows.get(name, 0) + n_rows

    return count
