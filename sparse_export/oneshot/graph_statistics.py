"""What the weight of a layer of a graph is multiplied by, read off the value that the layer gets.

Legend: N samples, C channels, P kernel positions, G groups of channels or matrices of a stack, K columns of
the weight (O, K) as `columns_from_weight` has them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from onnx import helper
from torch import Tensor, nn

from sparse_export.graph.layer_uses import LayerUse
from sparse_export.oneshot.unfolding import parts_of, patches
from sparse_export.signature import Array

__all__ = ["Factor", "factor_of", "inputs_of"]


@dataclass(frozen=True, kw_only=True)
class Factor:
    """A value, and how a weight meets it. Equal factors have equal statistics.

    Attributes:
        value: its name.
        turned: a row of the matrix product is a column of the value.
        scale: that the product is multiplied by.
        stack: sizes of the stack of matrices that the weight is; empty for one matrix.
        groups: of channels, of a convolution.
        transposed: of a transposed convolution: every place of the value meets the weight whole.
        kernel: of a convolution, and each of the following a number for each of its axes; None for products
            of matrices.
        strides: of a convolution.
        dilations: of a convolution.
        pads: before and after, axis by axis; None where `auto_pad` decides.
        auto_pad: SAME_UPPER or SAME_LOWER.
    """

    value: str
    turned: bool = False
    scale: float = 1.0
    stack: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    kernel: tuple[int, ...] | None = None
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[tuple[int, int], ...] | None = None
    auto_pad: str = ""


def factor_of(use: LayerUse) -> Factor:
    """What the layer's other operand is, and how the weight meets it."""
    node, shape = use.node, use.weight.values.shape
    factor = Factor(value=node.input[0 if use.position else 1])
    attributes = {found.name: helper.get_attribute_value(found) for found in node.attribute}
    if node.op_type == "MatMul":
        return replace(factor, turned=use.position == 0, stack=tuple(shape[:-2]))
    if node.op_type == "Gemm":
        of_other = bool(attributes.get("transA" if use.position else "transB", 0))
        turned = of_other if use.position else not of_other
        return replace(factor, turned=turned, scale=float(attributes.get("alpha", 1.0)))
    factor = replace(factor, groups=use.channel_groups, transposed=node.op_type == "ConvTranspose")
    return factor if factor.transposed else _of_convolution(factor, attributes, tuple(shape[2:]))


def _of_convolution(factor: Factor, attributes: dict[str, object], kernel: tuple[int, ...]) -> Factor:
    def numbers(name: str, default: Sequence[int]) -> tuple[int, ...]:
        found = attributes.get(name, default)
        assert isinstance(found, Sequence)
        return tuple(int(number) for number in found)

    ones = (1,) * len(kernel)
    padding = attributes.get("auto_pad", b"NOTSET")
    auto_pad = padding.decode() if isinstance(padding, bytes) else str(padding)
    flat = numbers("pads", ()) if auto_pad in ("NOTSET", "") else ()
    flat = flat or (0,) * (2 * len(kernel))
    return replace(
        factor,
        kernel=kernel,
        strides=numbers("strides", ones),
        dilations=numbers("dilations", ones),
        pads=None
        if auto_pad.startswith("SAME")
        else tuple(zip(flat[: len(kernel)], flat[len(kernel) :], strict=True)),
        auto_pad=auto_pad if auto_pad.startswith("SAME") else "",
    )


def inputs_of(factor: Factor, value: Array) -> Iterator[Tensor]:
    """The inputs of a weight, (G, inputs, K), in parts of bounded size.

    Args:
        factor: how the weight meets the value.
        value: floats.
    """
    x = torch.from_numpy(_readable(value))
    if factor.kernel is not None:
        padded = nn.functional.pad(x, _padding(factor, tuple(x.shape[2:])))
        yield from patches(padded, factor.kernel, factor.strides, factor.dilations, factor.groups)
    elif factor.transposed:
        channels = x.reshape(len(x), factor.groups, x.shape[1] // factor.groups, -1)
        yield from parts_of(channels.permute(1, 0, 3, 2).reshape(factor.groups, -1, channels.shape[2]))
    else:
        yield from parts_of(_rows(factor, x))


def _readable(value: Array) -> Array:
    """An array that torch takes without a copy where that can be."""
    if value.dtype.kind != "f":  # bfloat16, which NumPy has from another package
        return value.astype(np.float32)
    return value if value.flags.writeable else value.copy()


def _padding(factor: Factor, sizes: tuple[int, ...]) -> list[int]:
    """For torch: the last axis first, before and after."""
    if factor.pads is not None:
        pairs = list(factor.pads)
    else:
        assert factor.kernel is not None
        pairs = []
        for size, width, stride, dilation in zip(
            sizes, factor.kernel, factor.strides, factor.dilations, strict=True
        ):
            total = max((math.ceil(size / stride) - 1) * stride + dilation * (width - 1) + 1 - size, 0)
            less, more = total // 2, total - total // 2
            pairs.append((less, more) if factor.auto_pad == "SAME_UPPER" else (more, less))
    return [number for pair in reversed(pairs) for number in pair]


def _rows(factor: Factor, x: Tensor) -> Tensor:
    """The inputs of a product of matrices, (G, inputs, K)."""
    if x.dim() == 1:
        x = x[None]
    elif factor.turned:
        x = x.mT
    x = x if factor.scale == 1.0 else x * factor.scale
    if not factor.stack:
        return x.reshape(1, -1, x.shape[-1])
    around = torch.broadcast_shapes(x.shape[:-2], factor.stack)
    x = x.expand(*around, *x.shape[-2:])
    outer = len(around) - len(factor.stack)
    # Axes of the stack that have one matrix for all are inputs, like those before the stack.
    stacked = [outer + i for i, size in enumerate(factor.stack) if size > 1]
    shared = [axis for axis in range(len(around)) if axis not in stacked]
    x = x.permute(*stacked, *shared, len(around), len(around) + 1)
    return x.reshape(math.prod(factor.stack), -1, x.shape[-1])
