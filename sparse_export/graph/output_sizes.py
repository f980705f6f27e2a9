"""How many values a node makes, worked out before it makes them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx

from sparse_export.graph.nodes import attribute, is_standard
from sparse_export.graph.stored_tensors import LARGEST_RANK
from sparse_export.signature import Array

# Operators that make at most as many values as their largest input has.
NO_LARGER = frozenset(
    (
        *("Identity", "Cast", "CastLike", "QuantizeLinear", "DequantizeLinear", "Clip"),
        *("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Shape", "Size"),
        *("Neg", "Abs", "Sqrt", "Reciprocal", "Exp", "Log", "Sign", "Not", "BitwiseNot"),
        *("Floor", "Ceil", "Round", "Relu", "Tanh", "Sigmoid"),
        *("ScatterElements", "ScatterND", "CumSum", "Trilu"),
        *("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare"),
    )
)
BROADCAST = frozenset(
    (
        *("Add", "Sub", "Mul", "Div", "Pow", "Mod", "Max", "Min", "Sum", "Where"),
        *("And", "Or", "Xor", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitShift"),
        *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
    )
)


def n_made(node: onnx.NodeProto, inputs: Sequence[Array | None]) -> int | None:
    """Work out how many values a node makes before it does.

    Args:
        node: of any operator.
        inputs: what it gets.

    Returns:
        At least as many as it makes; None where that is not known.
    """
    given = [values for values in inputs if values is not None]
    if not has_known_size(node) or len(given) < len(inputs):
        return None
    try:
        return count_made(node, given)
    except (
        ValueError,
        IndexError,
        TypeError,
        ArithmeticError,
    ):  # inputs of a foreign graph that do not fit its node
        return None


def has_known_size(node: onnx.NodeProto) -> bool:
    """Is it known how many values the operator makes?

    Args:
        node: of any operator.

    Returns:
        Is it one of ONNX that `n_made` counts, or a Constant?
    """
    known = node.op_type in NO_LARGER | BROADCAST | _COUNTED.keys() | {"Constant"}
    return is_standard(node) and known


def count_made(node: onnx.NodeProto, inputs: Sequence[Array]) -> int:
    """As `n_made`, of a node with a known size.

    Args:
        node: for which `has_known_size` is true.
        inputs: what it gets, without those that are left out.

    Returns:
        At least as many values as it makes.

    Raises:
        ValueError: its inputs do not fit it; IndexError, TypeError, ArithmeticError or ArtefactError likewise.
    """
    if node.op_type in BROADCAST:
        return math.prod(np.broadcast_shapes(*(values.shape for values in inputs)))
    if node.op_type in _COUNTED:
        return _COUNTED[node.op_type](node, inputs)
    return max((values.size for values in inputs), default=0)


# How many values a node makes, of operators that can make more than they get.
def _n_expanded(node: onnx.NodeProto, inputs: Sequence[Array]) -> int:
    return math.prod(np.broadcast_shapes(inputs[0].shape, _ints(inputs[1])))


def _n_tiled(node: onnx.NodeProto, inputs: Sequence[Array]) -> int:
    return inputs[0].size * math.prod(_ints(inputs[1]))


def _n_filled(node: onnx.NodeProto, inputs: Sequence[Array]) -> int:
    return math.prod(_ints(inputs[0]))


def _n_gathered(node: onnx.NodeProto, inputs: Sequence[Array]) -> int:
    length = inputs[0].shape[attribute(node, "axis", 0)]
    return int(inputs[0].size // max(length, 1) * inputs[1].size)


def _n_like_indices(node: onnx.NodeProto, inputs: Sequence[Array]) -> int:
    return inputs[1].size


def _n_joined(node: onnx.NodeProto, inputs: Sequence[Array]) -> int:
    return sum(values.size for values in inputs)


def _n_padded(node: onnx.NodeProto, inputs: Sequence[Array]) -> int:
    pads = [abs(n) for n in _ints(inputs[1])]
    shape = inputs[0].shape
    if len(pads) != 2 * len(shape):  # only some axes are padded: as if every one by all of it
        return math.prod(n + sum(pads) for n in shape)
    return math.prod(n + pads[i] + pads[i + len(shape)] for i, n in enumerate(shape))


def _n_in_range(node: onnx.NodeProto, inputs: Sequence[Array]) -> int:
    start, limit, delta = (float(values.item()) for values in inputs)
    return math.ceil(max(0.0, (limit - start) / delta))


_COUNTED = {
    "Expand": _n_expanded,
    "Tile": _n_tiled,
    "ConstantOfShape": _n_filled,
    "Gather": _n_gathered,
    "GatherElements": _n_like_indices,
    "Concat": _n_joined,
    "Pad": _n_padded,
    "Range": _n_in_range,
}


def _ints(values: Array) -> tuple[int, ...]:
    if values.size > LARGEST_RANK * 2:
        raise ValueError(f"{values.size} numbers are given for the shape of a tensor")
    return tuple(int(value) for value in values.ravel())
