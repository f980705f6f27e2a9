"""A packed model made dense again, bit for bit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from sparse_export.errors import ArtefactError
from sparse_export.graph.names import graphs_of, inner_graphs
from sparse_export.graph.passes.format24 import (
    DOMAIN,
    FORMAT_KEY,
    FORMAT_VERSION,
    FUNCTION,
    TENSOR_KEY,
    fill,
    is_call,
    is_format_key,
    is_packed,
    set_prop,
    tensor_prop,
    unpack_function,
)
from sparse_export.graph.passes.weight24 import (
    BITS,
    PackedWeight,
    Shape,
    damaged,
    type_name,
    unpacked_bits,
)
from sparse_export.signature import Array

__all__ = ["expand", "expand_in_place"]


def expand(model: onnx.ModelProto) -> onnx.ModelProto:
    """Make the weights dense again, bit for bit those that were packed.

    Every weight is checked against its shape, type and SHA-256 in the metadata. At most twice the memory of
    the model is used.

    Args:
        model: packed or not; it stays as it is.

    Returns:
        A new model without any trace of the packing. A model that is not packed gives a copy.

    Raises:
        ArtefactError: something contradicts the format.
    """
    dense = onnx.ModelProto()
    dense.CopyFrom(model)
    expand_in_place(dense)
    return dense


def expand_in_place(dense: onnx.ModelProto) -> None:
    """As `expand`, of the model itself.

    Args:
        dense: packed or not, changed in place.

    Raises:
        ArtefactError: anything contradicts the format; the model is then neither packed nor dense.
    """
    if not is_packed(dense):
        return
    wanted = _take_props(dense)
    _take_function(dense)
    graph = dense.graph
    initializers = _initializers(graph)
    readers = _readers(graph)
    inputs = {value.name for value in graph.input}
    found: set[str] = set()
    gone: set[str] = set()
    nodes: list[int] = []
    moved_names: set[str] = set()
    for index, node in enumerate(graph.node):
        if not is_call(node):
            continue
        if len(node.input) != 3 or len(node.output) != 1:
            raise damaged(f"a call has {len(node.input)} inputs and {len(node.output)} outputs", "3 and 1")
        parts = []
        for name in node.input:
            if name not in initializers or name in inputs:
                raise damaged(f"the input {name!r} of a call is no constant", "an initializer")
            parts.append(initializers[name])
        nodes.append(index)
        weight, perm = node.output[0], None
        if weight not in wanted:
            moved_names.add(weight)
            step, perm = _transposition(graph, weight, readers)
            nodes.append(step)
            weight = graph.node[step].output[0]
        if weight not in wanted or weight in found or weight in initializers:
            raise damaged(f"{weight!r} is unpacked", "a weight that the metadata name, once,")
        if readers[node.input[0]] != 1:
            raise damaged(f"the values of {weight!r} are used {readers[node.input[0]]} times", "once")
        data_type, bits = _unpacked(parts, perm, weight)
        if (made := tensor_prop(data_type, bits)) != wanted[weight]:
            raise damaged(f"{weight!r} unpacks to {made}", wanted[weight])
        found.add(weight)
        gone.update(node.input[1:])
        fill(parts[0], weight, bits)
    if missing := wanted.keys() - found:
        raise damaged(f"nothing unpacks {min(missing)!r}", "a call for every weight that the metadata name")
    for index in sorted(nodes, reverse=True):
        del graph.node[index]
    _drop(graph, gone, moved_names)


def _take_props(model: onnx.ModelProto) -> dict[str, str]:
    """What the metadata say of each packed weight; they are removed from the model."""
    ours: dict[str, str] = {}
    kept = []
    for prop in model.metadata_props:
        if not isinstance(prop.key, str) or not isinstance(prop.value, str):  # not UTF-8
            raise damaged(f"the metadata hold {prop.key!r}: {prop.value!r}", "text")
        if not is_format_key(prop.key):
            kept.append((prop.key, prop.value))
        elif prop.key in ours:
            raise damaged(f"the metadata {prop.key!r} are there twice", "each key once")
        else:
            ours[prop.key] = prop.value
    version = ours.pop(FORMAT_KEY, None)
    if version != FORMAT_VERSION:
        raise ArtefactError(
            f"The packed model has format version {version!r}.",
            expected=f"{FORMAT_VERSION!r} was expected under {FORMAT_KEY!r}.",
            do="Install a newer sparse-export, or pack the model again.",
        )
    wanted = {
        key.removeprefix(TENSOR_KEY): value for key, value in ours.items() if key.startswith(TENSOR_KEY)
    }
    if unknown := ours.keys() - {TENSOR_KEY + weight for weight in wanted}:
        raise damaged(f"the metadata hold {min(unknown)!r}", "no such key")
    model.ClearField("metadata_props")
    for key, value in kept:
        set_prop(model, key, value)
    return wanted


def _take_function(model: onnx.ModelProto) -> None:
    """Remove the function and its domain, after checking that it is that of this format."""
    ours = [index for index, function in enumerate(model.functions) if function.domain == DOMAIN]
    versions = [entry.version for entry in model.opset_import if entry.domain == DOMAIN]
    if len(ours) != 1 or versions != [1]:
        raise damaged(
            f"it defines {len(ours)} functions of {DOMAIN} and imports its versions {versions}",
            "one, and [1]",
        )
    function = model.functions[ours[0]]
    opsets = [entry.version for entry in function.opset_import if entry.domain == ""]
    if len(opsets) != 1 or _bare(function) != _bare(unpack_function(opsets[0])):
        raise damaged(f"its function {DOMAIN}::{FUNCTION} is different", "that of the format")
    others = [f.node for f in model.functions if f.domain != DOMAIN]
    inner = [graph.node for nodes in (*others, model.graph.node) for graph in inner_graphs(nodes)]
    if any(node.domain == DOMAIN for nodes in (*others, *inner) for node in nodes):
        raise damaged("a function or a subgraph calls it", "calls in the main graph only")
    if any(node.domain == DOMAIN and not is_call(node) for node in model.graph.node):
        raise damaged(f"it calls something else of {DOMAIN}", FUNCTION)
    del model.functions[ours[0]]
    kept = [(entry.domain, entry.version) for entry in model.opset_import if entry.domain != DOMAIN]
    model.ClearField("opset_import")
    for domain, version in kept:
        model.opset_import.add(domain=domain, version=version)


def _bare(function: onnx.FunctionProto) -> bytes:
    """What a function computes, without the notes that tools leave in it."""
    bare = onnx.FunctionProto()
    bare.CopyFrom(function)
    for holder in (bare, *bare.node):
        holder.ClearField("doc_string")
        holder.ClearField("metadata_props")
    for node in bare.node:
        node.ClearField("name")
    bare.ClearField("value_info")
    content: bytes = bare.SerializeToString(deterministic=True)
    return content


def _initializers(graph: onnx.GraphProto) -> dict[str, TensorProto]:
    found: dict[str, TensorProto] = {}
    for tensor in graph.initializer:
        if tensor.name in found:
            raise damaged(f"the initializer {tensor.name!r} is there twice", "each once")
        found[tensor.name] = tensor
    return found


def _readers(graph: onnx.GraphProto) -> Counter[str]:
    """How often each tensor is read, as an output of the graph and in subgraphs too."""
    readers: Counter[str] = Counter()
    for one in graphs_of(graph):
        readers.update(name for node in one.node for name in node.input)
        readers.update(value.name for value in one.output)
    return readers


def _transposition(graph: onnx.GraphProto, name: str, readers: Mapping[str, int]) -> tuple[int, Shape]:
    """Index and permutation of the Transpose that alone reads a tensor."""
    at = [index for index, node in enumerate(graph.node) if name in node.input]
    node = graph.node[at[0]] if len(at) == 1 and readers[name] == 1 else None
    if node is None or (node.domain, node.op_type) != ("", "Transpose") or len(node.output) != 1:
        raise damaged(
            f"{name!r} is unpacked, which the metadata do not name, and not only transposed",
            "a weight of the metadata, or one Transpose to it,",
        )
    return at[0], next((tuple(a.ints) for a in node.attribute if a.name == "perm"), ())


def _unpacked(parts: Sequence[TensorProto], perm: Shape | None, weight: str) -> tuple[int, Array]:
    """Data type and bits of a weight, as stored.

    parts: values, meta, shape.  perm: None without a Transpose.
    """
    values, meta, shape = parts
    if values.data_type not in BITS:
        raise damaged(f"the values of {weight!r} are {type_name(values.data_type)}", "a type of the format")
    packed = PackedWeight(
        values=_raw(values, BITS[values.data_type]),
        meta=_raw(meta, np.dtype("u1"), TensorProto.UINT8),
        shape=tuple(_raw(shape, np.dtype("<i8"), TensorProto.INT64).reshape(-1).tolist()),
    )
    bits = unpacked_bits(packed)
    if perm is None:
        return values.data_type, bits
    if sorted(perm) != list(range(bits.ndim)):
        raise damaged(
            f"{weight!r} of shape {bits.shape} is transposed by {perm}", "a permutation of its axes"
        )
    return values.data_type, np.ascontiguousarray(bits.transpose(perm))


def _raw(tensor: TensorProto, dtype: np.dtype[Any], data_type: int | None = None) -> Array:
    """The values of an initializer, when they are where the format puts them."""
    n_bytes = math.prod(tensor.dims) * dtype.itemsize if all(n >= 0 for n in tensor.dims) else -1
    if data_type is not None and tensor.data_type != data_type:
        raise damaged(f"{tensor.name!r} is {type_name(tensor.data_type)}", f"{type_name(data_type)}")
    if tensor.data_location == TensorProto.EXTERNAL:
        raise ArtefactError(
            f"The values of {tensor.name!r} lie in another file.",
            expected="A model with its external data loaded was expected.",
            do="Read it with onnx.load(path).",
        )
    if len(tensor.raw_data) != n_bytes:
        raise damaged(
            f"{tensor.name!r} of shape {tuple(tensor.dims)} has {len(tensor.raw_data)} bytes", f"{n_bytes}"
        )
    return np.frombuffer(tensor.raw_data, dtype=dtype).reshape(tuple(tensor.dims))


def _drop(graph: onnx.GraphProto, initializers: set[str], values: set[str]) -> None:
    """Remove initializers that nothing reads any more, and what is noted about values that are gone."""
    readers = _readers(graph)
    for index in reversed(range(len(graph.initializer))):
        name = graph.initializer[index].name
        if name in initializers and not readers[name]:
            del graph.initializer[index]
    for index in reversed(range(len(graph.value_info))):
        if graph.value_info[index].name in values:
            del graph.value_info[index]
