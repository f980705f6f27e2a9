"""What nodes that compute on values, channel by channel, say of channels: activations, sums, norms, pools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator

from sparse_export.graph.channels.onnx_channels import REAL, Channels
from sparse_export.graph.channels.onnx_graph import Array, attribute, padded, title
from sparse_export.graph.layers import FLOATS

ONE_TO_ONE = frozenset(
    [
        "Abs",
        "Cast",
        "Ceil",
        "Celu",
        "Clip",
        "Cos",
        "Dropout",
        "Elu",
        "Erf",
        "Exp",
        "Floor",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "LeakyRelu",
        "Log",
        "Mish",
        "Neg",
        "Reciprocal",
        "Relu",
        "Round",
        "Selu",
        "Sigmoid",
        "Sign",
        "Sin",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Tanh",
        "ThresholdedRelu",
    ]
)


BROADCAST = frozenset(["Add", "Div", "Max", "Mean", "Min", "Mul", "PRelu", "Pow", "Sub", "Sum"])


REDUCE = frozenset(
    [
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceProd",
        "ReduceSum",
        "ReduceSumSquare",
    ]
)


def _evaluated(node: onnx.NodeProto, inputs: Sequence[Array | None], opset: int) -> Array | None:
    """What a node makes of small arrays, None when that cannot be had."""
    feeds = {name: x for name, x in zip(node.input, inputs, strict=True) if x is not None}
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for name, x in feeds.items()
        ],
        [helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None)],
    )
    one = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    try:
        with np.errstate(all="ignore"):
            found: Any = ReferenceEvaluator(one).run(None, feeds)
    except Exception:  # noqa: BLE001 - whatever it does not know; the channel counts as not constant then
        return None
    return np.asarray(found[0], dtype=np.float64)


def one_to_one(channels: Channels, node: onnx.NodeProto) -> bool:
    value = channels.values.get(node.input[0])
    if any(node.output[1:]) or any(name in channels.values for name in node.input[1:]):
        return False
    if value is None:
        return True
    if node.op_type == "Dropout" and channels.given(node, 2):  # may be told to train
        return False
    others = [channels.array(node, i) for i in range(1, len(node.input))]
    constant = None
    known = np.isfinite(value.constant)
    real = node.op_type != "Cast" or attribute(node, "to", 0) in FLOATS
    if real and known.any():
        numbers = np.where(known, value.constant, 0.0).astype(np.float32)
        found = _evaluated(node, [numbers, *others], channels.graph.opset)
        constant = None if found is None or found.shape != numbers.shape else np.where(known, found, np.nan)
    channels.set(node.output[0], value.axis, value.slots, constant)
    return True


def uniform(array: Array, axis: int) -> Array:
    """Per index of an axis the one number that all entries are, else NaN."""
    rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1).astype(np.float64)
    same: Array = np.where((rows == rows[:, :1]).all(axis=1), rows[:, 0], np.nan)
    return same


def broadcast(channels: Channels, node: onnx.NodeProto) -> bool:
    names = [name for name in node.input if name]
    shapes = [channels.shapes.get(name) for name in names]
    if any(shape is None for shape in shapes):
        return False
    known = [shape for shape in shapes if shape is not None]
    rank = max(map(len, known))
    found = [
        (value.axis + rank - len(shape), value)
        for name, shape in zip(names, known, strict=True)
        if (value := channels.values.get(name)) is not None
    ]
    if not found:
        return True
    wide = [pair for pair in found if len(pair[1].slots) > 1] or found
    axis, first = wide[0]
    n = len(first.slots)
    if any(place != axis or len(value.slots) not in (1, n) for place, value in found):
        return False
    columns = []
    for name, shape in zip(names, known, strict=True):
        at = axis - (rank - len(shape))
        size = shape[at] if at >= 0 else 1
        value, array = channels.values.get(name), channels.graph.arrays.get(name)
        if size not in (1, n):
            return False
        if value is not None:
            if size == n:
                channels.tie(first.slots, value.slots)
            else:
                channels.pin(value.slots, f"{title(node)} spreads it over all channels")
            columns.append(np.broadcast_to(value.constant, (n,)))
        elif array is not None and array.dtype in REAL:
            if at >= 0 and size == n:
                channels.claim(node, name, {at: first.slots})
                columns.append(uniform(array, at))
            else:
                flat = array.reshape(-1).astype(np.float64)
                one = flat[0] if flat.size and (flat == flat[0]).all() else np.nan
                columns.append(np.full(n, one))
        else:
            if size == n:
                channels.pin(first.slots, f"{title(node)} joins it with what cannot lose channels")
            columns.append(np.full(n, np.nan))
    channels.set(node.output[0], axis, first.slots, _joined(node, np.array(columns), channels.graph.opset))
    return True


def _joined(node: onnx.NodeProto, columns: Array, opset: int) -> Array:
    """Per channel what an operation on constants gives; 0 * anything is 0."""
    unknown = ~np.isfinite(columns).all(axis=0)
    result = np.full(columns.shape[1], np.nan)
    if not unknown.all():
        bare = onnx.NodeProto()
        bare.CopyFrom(node)
        del bare.input[:]
        bare.input.extend(f"x{i}" for i in range(len(columns)))
        found = _evaluated(bare, list(np.where(unknown, 1.0, columns).astype(np.float32)), opset)
        if found is not None and found.shape == result.shape:
            result = np.where(unknown, np.nan, found)
    if node.op_type == "Mul":
        result[(columns == 0).any(axis=0)] = 0.0
    return result


def batch_norm(channels: Channels, node: onnx.NodeProto) -> bool:
    value = channels.values.get(node.input[0])
    parameters = [channels.array(node, i) for i in range(1, 5)]
    if value is None:
        return True
    if value.axis != 1 or attribute(node, "training_mode", 0) or any(node.output[1:]):
        return False
    n = len(value.slots)
    known = [p.astype(np.float64) for p in parameters if p is not None and p.shape == (n,)]
    if len(known) != 4:
        return False
    for i in range(1, 5):
        channels.claim(node, node.input[i], {0: value.slots})
    scale, bias, mean, variance = known
    epsilon = attribute(node, "epsilon", 1e-5)
    factor = scale / np.sqrt(variance + epsilon)
    result = (value.constant - mean) * factor + bias
    result = np.where(factor == 0, bias, result).astype(np.float32).astype(np.float64)
    channels.set(node.output[0], 1, value.slots, result)
    return True


def pool(channels: Channels, node: onnx.NodeProto) -> bool:
    value = channels.values.get(node.input[0])
    if value is None:
        return True
    if value.axis != 1 or any(node.output[1:]):
        return False
    constant = value.constant
    if attribute(node, "ceil_mode", 0):  # a window may lie outside; what it then holds, runtimes disagree on
        constant = np.full_like(constant, np.nan)
    elif node.op_type == "AveragePool" and attribute(node, "count_include_pad", 0) and padded(node):
        constant = np.where(constant == 0, 0.0, np.nan)
    channels.set(node.output[0], 1, value.slots, constant)
    return True


def global_pool(channels: Channels, node: onnx.NodeProto) -> bool:
    value = channels.values.get(node.input[0])
    if value is None:
        return True
    if value.axis != 1:
        return False
    channels.set(node.output[0], 1, value.slots, value.constant)
    return True


def reduced_axes(channels: Channels, node: onnx.NodeProto, index: int, rank: int) -> set[int] | None:
    if channels.given(node, index):
        found = channels.array(node, index)
        axes = None if found is None else [int(axis) for axis in found.reshape(-1)]
    else:
        axes = attribute(node, "axes", None)
    return None if not axes else {axis % rank for axis in axes}


def reduce(channels: Channels, node: onnx.NodeProto) -> bool:
    value, shape = channels.values.get(node.input[0]), channels.shapes.get(node.input[0])
    if value is None:
        return True
    axes = None if shape is None else reduced_axes(channels, node, 1, len(shape))
    if axes is None or value.axis in axes:
        return False
    axis = value.axis
    if not attribute(node, "keepdims", 1):
        axis -= sum(other < axis for other in axes)
    if node.op_type in ("ReduceMean", "ReduceMax", "ReduceMin"):
        constant = value.constant
    elif node.op_type == "ReduceSum":
        constant = np.where(value.constant == 0, 0.0, np.nan)
    else:
        constant = None
    channels.set(node.output[0], axis, value.slots, constant)
    return True
