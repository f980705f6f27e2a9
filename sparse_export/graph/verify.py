"""What the layers of an ONNX graph are: shapes, zeros, multiply-accumulates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import numpy_helper

from sparse_export.artefact import GraphLayer
from sparse_export.errors import ArtefactError, UsageError

FLOATS = frozenset(
    (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
)
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

Shape = tuple[int, ...]


def onnx_from_file(path: str | Path) -> onnx.ModelProto:
    """Read an ONNX model with its external data, and check that it is one.

    Raises UsageError when there is no such file, ArtefactError when it is truncated or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(
            f"{path} is not a file.", expected="An .onnx file was expected.", do="Correct the path."
        )
    try:
        model = onnx.load(path)
        _check(model, path)
    except (DecodeError, onnx.checker.ValidationError, ValueError, OSError) as cause:
        reason = str(cause).strip().partition("\n")[0].rstrip(".") or type(cause).__name__
        raise ArtefactError(
            f"{path} cannot be read as ONNX: {reason}.",
            expected="A whole, valid ONNX model was expected; this one is truncated or something else.",
            do="Copy it again, or export it again.",
        ) from cause
    return model


def _check(model: onnx.ModelProto, path: Path) -> None:
    """By path where the weights lie beside the model: protobuf cannot hold more than 2 GB."""
    beside = any(tensor.HasField("data_location") for tensor in model.graph.initializer)
    onnx.checker.check_model(path if beside or model.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF else model)


def attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return next((int(found.i) for found in node.attribute if found.name == name), default)


def layer_weight(
    node: onnx.NodeProto, initializers: Mapping[str, onnx.TensorProto]
) -> tuple[str, int] | None:
    """Name and reduction axis of the weight of a Conv, ConvTranspose, Gemm or MatMul, else None.

    The axis is that of the weight as it is stored. Conv (O, I/groups, ...): 1. ConvTranspose
    (I, O/groups, ...): 0. Gemm: 1 with transB, else 0. MatMul: the last but one of the right operand, the
    last of the left (ONNX operator definitions, opset 13).
    """
    if node.op_type not in _LAYERS or node.domain not in ("", "ai.onnx"):
        return None
    if node.input[1] in initializers:
        rank = len(initializers[node.input[1]].dims)
        axis = {"Conv": 1, "ConvTranspose": 0, "MatMul": max(rank - 2, 0)}.get(node.op_type)
        return node.input[1], attribute(node, "transB", 0) if axis is None else axis
    if node.op_type == "MatMul" and node.input[0] in initializers:
        return node.input[0], len(initializers[node.input[0]].dims) - 1
    return None


def graph_layers(model: onnx.ModelProto) -> tuple[GraphLayer, ...]:
    """The layers of a graph that have a weight among the initializers, in graph order.

    A weight that two nodes share gives two layers. Multiply-accumulates are those of one sample: a free
    leading axis of an input counts as 1, a fixed one is divided out; None where shapes stay unknown.
    """
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    shapes, n_samples = _shapes_of_one_sample(model)
    layers = []
    for node in model.graph.node:
        found = layer_weight(node, initializers)
        if found is None:
            continue
        name, axis = found
        shape = tuple(initializers[name].dims)
        n_weights = math.prod(shape)
        n_nonzero = int(np.count_nonzero(numpy_helper.to_array(initializers[name])))
        uses = _uses_of_a_weight(node, shape, axis, shapes)
        uses = uses // n_samples if uses is not None and uses % n_samples == 0 else None
        layers.append(
            GraphLayer(
                node=node.name or node.output[0],
                op_type=node.op_type,
                weight=name,
                shape=shape,
                reduction_axis=axis,
                n_weights=n_weights,
                n_nonzero=n_nonzero,
                macs=None if uses is None else uses * n_weights,
                nonzero_macs=None if uses is None else uses * n_nonzero,
            )
        )
    return tuple(layers)


def _uses_of_a_weight(
    node: onnx.NodeProto, shape: Shape, axis: int, shapes: Mapping[str, Shape]
) -> int | None:
    """How often each weight is multiplied: per output position, for ConvTranspose per input position."""
    transposed = node.op_type == "ConvTranspose"
    values = shapes.get(node.input[0] if transposed else node.output[0])
    if values is None or not math.prod(shape):
        return None
    if node.op_type in ("Conv", "ConvTranspose"):
        return math.prod(values) // shape[0]
    return math.prod(values) * shape[axis] // math.prod(shape)


def _shapes_of_one_sample(model: onnx.ModelProto) -> tuple[dict[str, Shape], int]:
    """Known shapes with free leading axes of the inputs set to 1, and the leading axis where it is fixed."""
    one = onnx.ModelProto()
    one.CopyFrom(model)
    del one.graph.value_info[:]
    initializers = {tensor.name for tensor in one.graph.initializer}
    inputs = [value for value in one.graph.input if value.name not in initializers]
    n_samples = 1
    for index, value in enumerate(inputs):
        dims = value.type.tensor_type.shape.dim
        if not dims:
            continue
        if dims[0].HasField("dim_value"):
            n_samples = dims[0].dim_value if index == 0 else n_samples
        else:
            dims[0].dim_value = 1
    for value in one.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        one = onnx.shape_inference.infer_shapes(one, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError):  # somebody's graph; ValueError: above 2 GB
        return {}, 1
    values = (*inputs, *one.graph.value_info, *one.graph.output)
    return {value.name: shape for value in values if (shape := _shape(value)) is not None}, max(n_samples, 1)


def _shape(value: onnx.ValueInfoProto) -> Shape | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape") or any(not dim.HasField("dim_value") for dim in tensor.shape.dim):
        return None
    return tuple(dim.dim_value for dim in tensor.shape.dim)


def count_parameters(model: onnx.ModelProto) -> tuple[int, int]:
    """Entries of all float initializers, and how many of them are not zero."""
    floats = [tensor for tensor in model.graph.initializer if tensor.data_type in FLOATS]
    n_nonzero = sum(int(np.count_nonzero(numpy_helper.to_array(tensor))) for tensor in floats)
    return sum(math.prod(tensor.dims) for tensor in floats), n_nonzero
