"""What layers that sum over channels say of them: Conv, ConvTranspose, Gemm, MatMul."""

from __future__ import annotations

import math

import numpy as np
import onnx

from sparse_export.graph.channels.onnx_channels import REAL, Channels, Layer
from sparse_export.graph.channels.onnx_graph import Array, attribute, padded, title


def _bias(channels: Channels, node: onnx.NodeProto, n: int) -> Array | None:
    """The bias of a layer as (n,), None when it is no such constant."""
    if not channels.given(node, 2):
        return np.zeros(n)
    bias = channels.array(node, 2)
    if bias is None or bias.size not in (1, n) or math.prod(bias.shape[:-1]) != 1:
        return None
    return np.broadcast_to(bias.reshape(-1), (n,)).astype(np.float64)


def _sum_layer(
    channels: Channels,
    node: onnx.NodeProto,
    *,
    w_OIK: Array,
    in_axis: int,
    out_axis: int,
    input_axis: int,
    output_axis: int,
    bias: Array,
    scale: float = 1.0,
    same_everywhere: bool = True,
) -> bool:
    """A layer that sums over all channels of its input.

    w_OIK: (outputs, inputs, whatever is summed over besides).  same_everywhere: a constant input adds the
    same to every position of the output; else only a constant 0 does.
    """
    if w_OIK.dtype not in REAL:
        return False
    weight = node.input[1]
    value = channels.values.get(node.input[0])
    n_out, n_in = w_OIK.shape[:2]
    reads_OI = (w_OIK != 0).any(axis=2)
    if value is not None and value.axis == input_axis and len(value.slots) == n_in:
        in_slots, constant = value.slots, value.constant
    else:
        channels._pin_value(node.input[0], f"{title(node)} reads it along another axis")
        in_slots, constant = channels.fresh(n_in), np.full(n_in, np.nan)
        channels.pin(in_slots, f"nothing before {title(node)} can lose channels")
    out_slots = channels.fresh(n_out)
    foldable = np.isfinite(constant) if same_everywhere else constant == 0
    channels.claim(node, weight, {in_axis: in_slots, out_axis: out_slots})
    stored = channels.array(node, 2)
    if stored is not None and stored.size == n_out and stored.ndim:
        channels.claim(node, node.input[2], {stored.ndim - 1: out_slots})
    layer = Layer(
        node=node,
        weight=weight,
        in_axis=in_axis,
        out_axis=out_axis,
        in_slots=in_slots,
        out_slots=out_slots,
        w_OIK=w_OIK,
        reads_OI=reads_OI,
        foldable=foldable,
        constant=constant,
        scale=scale,
    )
    channels.layers.append(layer)
    with np.errstate(all="ignore"):
        rows = bias + layer.contribution(np.flatnonzero(foldable))
        rows[reads_OI[:, ~foldable].any(axis=1)] = np.nan
        rows = rows.astype(w_OIK.dtype).astype(np.float64)
    channels.set(node.output[0], output_axis, out_slots, rows)
    return True


def conv(channels: Channels, node: onnx.NodeProto) -> bool:
    weight = channels.array(node, 1)
    if weight is None or weight.ndim < 3 or not weight.size:
        return False
    bias = _bias(channels, node, weight.shape[0])
    if bias is None:
        return False
    w_OIK = weight.reshape(*weight.shape[:2], -1)
    groups = attribute(node, "group", 1)
    if groups > 1:
        return _grouped_conv(channels, node, w_OIK, groups, bias)
    return _sum_layer(
        channels,
        node,
        w_OIK=w_OIK,
        in_axis=1,
        out_axis=0,
        input_axis=1,
        output_axis=1,
        bias=bias,
        same_everywhere=not padded(node),
    )


def _grouped_conv(channels: Channels, node: onnx.NodeProto, w_OIK: Array, groups: int, bias: Array) -> bool:
    """Groups leave whole, inputs and outputs together: then the rest is a convolution of fewer groups."""
    n_out, n_in = w_OIK.shape[:2]
    value = channels.values.get(node.input[0])
    if value is None or value.axis != 1 or len(value.slots) != n_in * groups or w_OIK.dtype not in REAL:
        return False
    out_slots = channels.fresh(n_out)
    group_of_input = np.repeat(np.arange(groups), n_in)
    group_of_output = np.repeat(np.arange(groups), n_out // groups)
    meeting = channels.fresh(groups)
    channels.tie(meeting[group_of_input], value.slots)
    channels.tie(meeting[group_of_output], out_slots)
    channels.claim(node, node.input[1], {0: out_slots})
    stored = channels.array(node, 2)
    if stored is not None and stored.size == n_out and stored.ndim == 1:
        channels.claim(node, node.input[2], {0: out_slots})
    reads_OI = (w_OIK != 0).any(axis=2)
    constant_OI = value.constant.reshape(groups, n_in)[group_of_output]
    usable_OI = (constant_OI == 0) if padded(node) else np.isfinite(constant_OI)
    with np.errstate(all="ignore"):
        sums_OI = w_OIK.sum(axis=2, dtype=np.float64)
        rows = bias + (sums_OI * np.where(reads_OI & usable_OI, constant_OI, 0.0)).sum(axis=1)
        rows[(reads_OI & ~usable_OI).any(axis=1)] = np.nan
        rows = rows.astype(w_OIK.dtype).astype(np.float64)
    channels.set(node.output[0], 1, out_slots, rows)
    channels.layers.append(
        Layer(
            node=node,
            weight=node.input[1],
            in_axis=1,
            out_axis=0,
            in_slots=np.zeros(0, np.int64),
            out_slots=out_slots,
            w_OIK=w_OIK,
            reads_OI=reads_OI,
            foldable=np.zeros(n_in, np.bool_),
            constant=np.full(n_in, np.nan),
            groups=groups,
        )
    )
    return True


def conv_transpose(channels: Channels, node: onnx.NodeProto) -> bool:
    weight = channels.array(node, 1)
    if weight is None or weight.ndim < 3 or not weight.size or attribute(node, "group", 1) != 1:
        return False
    bias = _bias(channels, node, weight.shape[1])
    if bias is None:
        return False
    w_OIK = weight.reshape(*weight.shape[:2], -1).swapaxes(0, 1)
    return _sum_layer(
        channels,
        node,
        w_OIK=w_OIK,
        in_axis=0,
        out_axis=1,
        input_axis=1,
        output_axis=1,
        bias=bias,
        same_everywhere=False,  # fewer kernel positions meet at the border
    )


def gemm(channels: Channels, node: onnx.NodeProto) -> bool:
    weight = channels.array(node, 1)
    if weight is None or weight.ndim != 2 or not weight.size or attribute(node, "transA", 0):
        return False
    transposed = bool(attribute(node, "transB", 0))
    w_OI = weight if transposed else weight.T
    bias = _bias(channels, node, w_OI.shape[0])
    if bias is None:
        return False
    return _sum_layer(
        channels,
        node,
        w_OIK=w_OI[:, :, None],
        in_axis=1 if transposed else 0,
        out_axis=0 if transposed else 1,
        input_axis=1,
        output_axis=1,
        bias=attribute(node, "beta", 1.0) * bias,
        scale=attribute(node, "alpha", 1.0),
    )


def matmul(channels: Channels, node: onnx.NodeProto) -> bool:
    weight, shape = channels.array(node, 1), channels.shapes.get(node.input[0])
    if weight is None or weight.ndim != 2 or not weight.size or shape is None or len(shape) < 2:
        return False
    return _sum_layer(
        channels,
        node,
        w_OIK=weight.T[:, :, None],
        in_axis=0,
        out_axis=1,
        input_axis=len(shape) - 1,
        output_axis=len(shape) - 1,
        bias=np.zeros(weight.shape[1]),
    )
