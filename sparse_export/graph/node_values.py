"""What one node makes of known inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from onnx import helper

from sparse_export.errors import ArtefactError, first_line
from sparse_export.graph.evaluation_limits import (
    WORK_OF_A_NODE,
    NotEvaluatedError,
    require_bounded,
)
from sparse_export.graph.nodes import QUANTIZING, attribute, node_name
from sparse_export.graph.output_sizes import count_made
from sparse_export.graph.stored_tensors import Read
from sparse_export.signature import Array

_QUANTIZING_OPSET = (
    21  # of which those since 10 are special cases; the reference implementation lacks some of them
)


def computed(
    node: onnx.NodeProto,
    output: str,
    inputs: Sequence[Array | None],
    opset: int,
    spend: Callable[[int], None],
    read: Read,
) -> Array:
    """Compute one output of a node.

    Args:
        node: of which it is known how many values it makes.
        output: the name of the output.
        inputs: what the node gets, None for an input that is left out.
        opset: of ONNX, in which the node is to be read.
        spend: is called with the number of values that it takes, before they are computed; may raise.
        read: gives the values of a Constant.

    Returns:
        The values.

    Raises:
        NotEvaluatedError: they are too many, or the node cannot be computed.
        ArtefactError: the node or what it stores is invalid.
    """
    from onnx.reference.op_run import RuntimeContextError, RuntimeImplementationError, RuntimeTypeError

    given = [values for values in inputs if values is not None]
    try:
        if node.op_type == "Constant":
            return _value_of_constant(node, read)
        if node.op_type == "Cast" and attribute(node, "to", 0) == onnx.TensorProto.STRING:
            raise NotEvaluatedError("is computed as text")
        n_values = count_made(node, given)
        require_bounded(n_values)
        spend(WORK_OF_A_NODE + n_values)
        if node.op_type in ("ScatterElements", "GatherElements"):
            return _along_axis(node, given)
        return _by_reference(node, output, inputs, opset)
    except (ArtefactError, NotEvaluatedError):
        raise
    except (
        NotImplementedError,
        RuntimeContextError,
        RuntimeImplementationError,
        RuntimeTypeError,
    ) as cause:
        raise NotEvaluatedError(
            f"is computed by {node.op_type}, which is not evaluated here: {first_line(cause)}"
        ) from cause
    except Exception as cause:  # a wrong graph makes the reference implementation fail in any way
        raise NotEvaluatedError(
            f"is computed by the {node.op_type} {node_name(node)}, which fails: "
            f"{type(cause).__name__}: {first_line(cause)}"
        ) from cause


def _value_of_constant(node: onnx.NodeProto, read: Read) -> Array:
    for found in node.attribute:
        match found.name:
            case "value":
                return read(found.t)
            case "sparse_value":
                return read(found.sparse_tensor)
            case "value_float":
                return np.array(found.f, dtype=np.float32)
            case "value_floats":
                return np.array(found.floats, dtype=np.float32)
            case "value_int":
                return np.array(found.i, dtype=np.int64)
            case "value_ints":
                return np.array(found.ints, dtype=np.int64)
    raise ValueError("it has no value")


def _along_axis(node: onnx.NodeProto, inputs: Sequence[Array]) -> Array:
    """ScatterElements and GatherElements.

    The reference implementation scatters entry by entry, minutes for a weight, and gathers from at most 64.
    """
    data, indices = inputs[0], inputs[1]
    axis = attribute(node, "axis", 0) % data.ndim
    if any(data.shape[i] != indices.shape[i] for i in range(data.ndim) if i != axis):
        raise NotImplementedError(f"indices {indices.shape} into {data.shape}")
    if node.op_type == "GatherElements":
        return np.take_along_axis(data, indices, axis)
    reduction = next((found.s for found in node.attribute if found.name == "reduction"), b"none")
    if reduction != b"none":
        raise NotImplementedError(f"reduction {reduction.decode(errors='replace')}")
    if inputs[2].shape != indices.shape:
        raise ValueError(f"{inputs[2].shape} updates for {indices.shape} indices")
    values = data.copy()
    np.put_along_axis(values, indices, inputs[2], axis)
    return values


def _by_reference(node: onnx.NodeProto, output: str, inputs: Sequence[Array | None], opset: int) -> Array:
    from onnx.reference import ReferenceEvaluator

    plain = onnx.NodeProto()
    plain.CopyFrom(node)
    plain.domain = ""
    if plain.op_type in QUANTIZING:
        opset = max(opset, _QUANTIZING_OPSET)
    names = list(dict.fromkeys(name for name in node.input if name))
    function = helper.make_function(
        "", "one", names, list(filter(None, node.output)), [plain], [helper.make_opsetid("", opset)]
    )
    feeds = {name: values for name, values in zip(node.input, inputs, strict=True) if name}
    (found,) = ReferenceEvaluator(function).run([output], feeds, attributes={})
    return np.asarray(found)
