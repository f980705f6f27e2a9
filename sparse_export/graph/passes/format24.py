"""The format of packed 2:4 weights in an ONNX model, as docs/packed-format.md has it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sparse_export.graph.passes.weight24 import type_name
from sparse_export.signature import Array

DOMAIN = "sparse24"
FUNCTION = "Unpack24"
FORMAT_VERSION = "1"
FORMAT_KEY = "sparse24.format"
TENSOR_KEY = "sparse24.tensor:"

MIN_OPSET = 15  # Shape with `end` and CastLike
MIN_IR_VERSION = 8  # model-local functions


def is_packed(model: onnx.ModelProto) -> bool:
    """Does the graph call, or the model define, the function that unpacks 2:4 weights?

    Args:
        model: any.

    Returns:
        Is one of the two there?
    """
    return any((f.domain, f.name) == (DOMAIN, FUNCTION) for f in model.functions) or any(
        map(is_call, model.graph.node)
    )


def packed_weights(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the packed weights, as the metadata have them.

    Args:
        model: packed or not.

    Returns:
        The names in the order of the metadata; none for a model that is not packed.
    """
    if not is_packed(model):
        return ()
    keys = (prop.key for prop in model.metadata_props if is_format_key(prop.key))
    return tuple(key.removeprefix(TENSOR_KEY) for key in keys if key.startswith(TENSOR_KEY))


def unpack_function(opset: int) -> onnx.FunctionProto:
    """Make `sparse24::Unpack24(values, meta, shape)` of operators that runtimes fold and that keep bits.

    Where and Pad are not used: onnxruntime has neither for float16 on the CPU, and would go through float32.

    Args:
        opset: of ONNX, in which the function is written.

    Returns:
        The function.
    """

    def constant(name: str, values: Sequence[int], dtype: type[np.generic]) -> onnx.NodeProto:
        return helper.make_node(
            "Constant", [], [name], value=numpy_helper.from_array(np.array(values, dtype=dtype), name)
        )

    nodes = [
        constant("zero", [0], np.int64),
        constant("one", [1], np.int64),
        constant("members", [4], np.int64),
        constant("two_columns", [-1, 2], np.int64),
        constant("shifts", [0, 2, 4, 6], np.uint8),
        constant("four", [4], np.uint8),
        constant("blank", [0], np.int8),
        helper.make_node("Shape", ["values"], ["n_groups"], start=0, end=1),
        helper.make_node("Unsqueeze", ["meta", "one"], ["meta_column"]),
        helper.make_node("BitShift", ["meta_column", "shifts"], ["shifted"], direction="RIGHT"),
        helper.make_node("Mod", ["shifted", "four"], ["two_bits"]),
        helper.make_node("Cast", ["two_bits"], ["wide"], to=TensorProto.INT32),
        helper.make_node("Reshape", ["wide", "two_columns"], ["padded_indices"]),
        helper.make_node("Slice", ["padded_indices", "zero", "n_groups", "zero"], ["indices"]),
        helper.make_node("Concat", ["n_groups", "members"], ["groups_shape"], axis=0),
        helper.make_node("Expand", ["blank", "groups_shape"], ["blank_groups"]),
        helper.make_node("CastLike", ["blank_groups", "values"], ["zero_groups"]),
        helper.make_node("ScatterElements", ["zero_groups", "indices", "values"], ["groups"], axis=1),
        helper.make_node("Reshape", ["groups", "shape"], ["dense"]),
    ]
    return helper.make_function(
        DOMAIN, FUNCTION, ["values", "meta", "shape"], ["dense"], nodes, [helper.make_opsetid("", opset)]
    )


def is_call(node: onnx.NodeProto) -> bool:
    """Does a node call the function that unpacks?

    Args:
        node: of any graph.

    Returns:
        Is it `sparse24::Unpack24`?
    """
    return (node.domain, node.op_type) == (DOMAIN, FUNCTION)


def is_format_key(key: Any) -> bool:
    """Is it a key that the format has in the metadata?

    Args:
        key: of a metadata entry; protobuf gives bytes where it is not UTF-8.

    Returns:
        Does it begin as the keys of the format do?
    """
    return isinstance(key, str) and key.startswith(f"{DOMAIN}.")


def set_prop(model: onnx.ModelProto, key: str, value: str) -> None:
    """Add an entry to the metadata of a model.

    Args:
        model: changed in place.
        key: that the metadata do not have yet.
        value: of the entry.
    """
    model.metadata_props.add(key=key, value=value)


def tensor_prop(data_type: int, bits: Array) -> str:
    """What the metadata say of a weight: type, shape and the SHA-256 of its bytes, as stored when dense.

    Args:
        data_type: of `TensorProto`.
        bits: the dense weight as unsigned integers of its width.

    Returns:
        The value under `TENSOR_KEY` with the weight's name.
    """
    shape = ",".join(map(str, bits.shape))
    return f"{type_name(data_type)} {shape} {hashlib.sha256(bits.data).hexdigest()}"


def fill(tensor: TensorProto, name: str, array: Array) -> None:
    """Give a tensor another name, shape and content; its notes stay.

    Args:
        tensor: changed in place.
        name: the new one.
        array: the new content, of the tensor's type or as unsigned integers of its width.
    """
    for field in ("dims", "raw_data", "float_data", "int32_data"):
        tensor.ClearField(field)
    tensor.name = name
    tensor.dims.extend(array.shape)
    tensor.raw_data = array.tobytes()
