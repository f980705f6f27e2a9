"""How layers that sum over channels take fewer: Conv, ConvTranspose, Gemm, MatMul."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx

from sparse_export.graph.channels import reasons
from sparse_export.graph.channels.graph_trace import Value
from sparse_export.graph.channels.labels import Labels
from sparse_export.graph.channels.onnx_graph import Array, attribute, padded, title
from sparse_export.graph.channels.removal import REAL, Layer, Removal, with_numbers

__all__ = ["conv", "conv_transpose", "gemm", "matmul"]

Made = Sequence[Value]


def _bias(removal: Removal, node: onnx.NodeProto, n: int) -> Array | None:
    """The bias of a layer as (n,), None when it is no such constant."""
    if not removal.given(node, 2):
        return np.zeros(n)
    bias = removal.array(node, 2)
    if bias is None or bias.size not in (1, n) or math.prod(bias.shape[:-1]) != 1:
        return None
    return np.broadcast_to(bias.reshape(-1), (n,)).astype(np.float64)


def _sum_layer(
    removal: Removal,
    node: onnx.NodeProto,
    made: Made,
    *,
    w_OIK: Array,
    in_axis: int,
    out_axis: int,
    axis: int,
    bias: Array,
    scale: float = 1.0,
    same_everywhere: bool = True,
) -> Made | None:
    """A layer that sums over all channels of its input.

    w_OIK: (outputs, inputs, whatever is summed over besides).  axis: of input and output.  same_everywhere: a
    constant input adds the same to every position of the output; else only a constant 0 does.
    """
    if w_OIK.dtype not in REAL or not isinstance(made[0], Labels):
        return None
    n_out, n_in = w_OIK.shape[:2]
    reads_OI = (w_OIK != 0).any(axis=2)
    x = removal.labels_of(node, 0)
    axis %= len(made[0].shape)
    in_slots = removal.slots(x, axis, n_in, reasons.nothing_before(title(node)))
    out_slots = removal.slots(made[0], axis, n_out, reasons.shared_weight(title(node)))
    constant = np.full(n_in, np.nan)
    if x is not None and x.numbers is not None and x.long in ([], [axis]):
        constant = np.broadcast_to(x.numbers.reshape(-1).numpy(), (n_in,))
    foldable = np.isfinite(constant) if same_everywhere else constant == 0
    removal.claim(node.input[1], {in_axis: in_slots, out_axis: out_slots})
    _claim_bias(removal, node, n_out, out_slots)
    layer = Layer(
        node=node,
        weight=node.input[1],
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
    removal.layers.append(layer)
    with np.errstate(all="ignore"):
        rows = bias + layer.contribution(np.flatnonzero(foldable))
        rows[reads_OI[:, ~foldable].any(axis=1)] = np.nan
        rows = rows.astype(w_OIK.dtype).astype(np.float64)
    return [_with_rows(made[0], axis, rows)]


def _with_rows(made: Labels, axis: int, rows: Array) -> Labels:
    if made.shape[axis] > 1 and made.long != [axis]:
        return made
    return with_numbers(made, rows.reshape(made.atoms.shape))


def _claim_bias(removal: Removal, node: onnx.NodeProto, n: int, slots: Array) -> None:
    stored = removal.array(node, 2)
    if stored is not None and stored.size == n and stored.ndim:
        removal.claim(node.input[2], {stored.ndim - 1: slots})


def conv(removal: Removal, node: onnx.NodeProto, made: Made) -> Made | None:
    """Conv, grouped or not."""
    weight = removal.array(node, 1)
    if weight is None or weight.ndim < 3 or not weight.size:
        return None
    bias = _bias(removal, node, weight.shape[0])
    if bias is None:
        return None
    w_OIK = weight.reshape(*weight.shape[:2], -1)
    groups = attribute(node, "group", 1)
    if groups > 1:
        return _grouped(removal, node, made, w_OIK, groups, bias)
    return _sum_layer(
        removal,
        node,
        made,
        w_OIK=w_OIK,
        in_axis=1,
        out_axis=0,
        axis=1,
        bias=bias,
        same_everywhere=not padded(node),
    )


def _grouped(
    removal: Removal, node: onnx.NodeProto, made: Made, w_OIK: Array, groups: int, bias: Array
) -> Made | None:
    """Groups leave whole, inputs and outputs together: then the rest is a convolution of fewer groups."""
    n_out, n_in = w_OIK.shape[:2]
    x = removal.labels_of(node, 0)
    if x is None or x.long != [1] or not isinstance(made[0], Labels) or w_OIK.dtype not in REAL:
        return None
    out_slots = removal.slots(made[0], 1, n_out, reasons.shared_weight(title(node)))
    in_slots = removal.slots(x, 1, n_in * groups, reasons.nothing_before(title(node)))
    group_of_input = np.repeat(np.arange(groups), n_in)
    group_of_output = np.repeat(np.arange(groups), n_out // groups)
    meeting = in_slots[::n_in]
    removal.tie(meeting[group_of_input], in_slots)
    removal.tie(meeting[group_of_output], out_slots)
    removal.claim(node.input[1], {0: out_slots})
    _claim_bias(removal, node, n_out, out_slots)
    reads_OI = (w_OIK != 0).any(axis=2)
    numbers = np.full(n_in * groups, np.nan) if x.numbers is None else x.numbers.reshape(-1).numpy()
    constant_OI = numbers.reshape(groups, n_in)[group_of_output]
    usable_OI = (constant_OI == 0) if padded(node) else np.isfinite(constant_OI)
    with np.errstate(all="ignore"):
        sums_OI = w_OIK.sum(axis=2, dtype=np.float64)
        rows = bias + (sums_OI * np.where(reads_OI & usable_OI, constant_OI, 0.0)).sum(axis=1)
        rows[(reads_OI & ~usable_OI).any(axis=1)] = np.nan
        rows = rows.astype(w_OIK.dtype).astype(np.float64)
    layer = Layer(
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
    removal.layers.append(layer)
    return [_with_rows(made[0], 1, rows)]


def conv_transpose(removal: Removal, node: onnx.NodeProto, made: Made) -> Made | None:
    """ConvTranspose without groups."""
    weight = removal.array(node, 1)
    if weight is None or weight.ndim < 3 or not weight.size or attribute(node, "group", 1) != 1:
        return None
    bias = _bias(removal, node, weight.shape[1])
    if bias is None:
        return None
    return _sum_layer(
        removal,
        node,
        made,
        w_OIK=weight.reshape(*weight.shape[:2], -1).swapaxes(0, 1),
        in_axis=0,
        out_axis=1,
        axis=1,
        bias=bias,
        same_everywhere=False,  # fewer kernel positions meet at the border
    )


def gemm(removal: Removal, node: onnx.NodeProto, made: Made) -> Made | None:
    """Gemm by a stored weight."""
    weight = removal.array(node, 1)
    if weight is None or weight.ndim != 2 or not weight.size or attribute(node, "transA", 0):
        return None
    transposed = bool(attribute(node, "transB", 0))
    w_OI = weight if transposed else weight.T
    bias = _bias(removal, node, w_OI.shape[0])
    if bias is None:
        return None
    return _sum_layer(
        removal,
        node,
        made,
        w_OIK=w_OI[:, :, None],
        in_axis=1 if transposed else 0,
        out_axis=0 if transposed else 1,
        axis=1,
        bias=attribute(node, "beta", 1.0) * bias,
        scale=attribute(node, "alpha", 1.0),
    )


def matmul(removal: Removal, node: onnx.NodeProto, made: Made) -> Made | None:
    """MatMul by a stored weight from the right."""
    weight = removal.array(node, 1)
    if weight is None or weight.ndim != 2 or not weight.size:
        return None
    return _sum_layer(
        removal,
        node,
        made,
        w_OIK=weight.T[:, :, None],
        in_axis=0,
        out_axis=1,
        axis=-1,
        bias=np.zeros(weight.shape[1]),
    )
