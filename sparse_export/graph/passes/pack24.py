"""2:4 weights of an ONNX graph stored packed: two values and one nibble for every four.

The format is docs/packed-format.md.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, helper, numpy_helper

from sparse_export.errors import ArtefactError, UsageError
from sparse_export.graph.foreign import onnx_from_file
from sparse_export.graph.passes.packable import (
    ONNX_DOMAINS,
    PackChoice,
    names_in_subgraphs,
    pack_choices,
)
from sparse_export.graph.passes.weight24 import (
    BITS,
    Array,
    PackedWeight,
    Shape,
    bits_of,
    damaged,
    pack_weight,
    type_name,
    unpack_weight,
    unpacked_bits,
)

__all__ = [
    "DOMAIN",
    "FUNCTION",
    "PackChoice",
    "PackedWeight",
    "dense_from_file",
    "expand",
    "is_packed",
    "may_be_packed",
    "pack",
    "pack_choices",
    "pack_weight",
    "packed_weights",
    "unpack_weight",
]

DOMAIN = "sparse24"
FUNCTION = "Unpack24"
FORMAT_VERSION = "1"
FORMAT_KEY = "sparse24.format"
TENSOR_KEY = "sparse24.tensor:"

MIN_OPSET = 15  # Shape with `end` and CastLike
MIN_IR_VERSION = 8  # model-local functions


def is_packed(model: onnx.ModelProto) -> bool:
    """Does the graph call, or the model define, the function that unpacks 2:4 weights?"""
    return any((f.domain, f.name) == (DOMAIN, FUNCTION) for f in model.functions) or any(
        map(_is_call, model.graph.node)
    )


def names_packing(content: bytes) -> bool:
    """Does what an ONNX file holds name the format at all?"""
    return DOMAIN.encode() in content


def may_be_packed(path: Path) -> bool:
    """Does the file name the format at all?

    A cheap look that spares parsing most files that are not packed.
    """
    needle = DOMAIN.encode()
    tail = b""
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            if needle in tail + block:
                return True
            tail = block[-len(needle) :]
    return False


def dense_from_file(path: str | Path) -> onnx.ModelProto:
    """Read an ONNX model with its external data, packed or not, with dense weights.

    Only the packing is checked: onnx's checker takes longer than all the rest. Raises UsageError when there
    is no such file, ArtefactError when it is no ONNX model or as `expand` does.
    """
    return _dense(onnx_from_file(path), path)


def dense_from_bytes(content: bytes, path: str | Path) -> onnx.ModelProto:
    """As `dense_from_file`, of what a file held that was read already. path: of the file, for errors."""
    try:
        model = onnx.load_from_string(content)
    except DecodeError as cause:
        raise ArtefactError(f"{path} cannot be read as ONNX: {cause}.", do="Build it again.") from cause
    return _dense(model, path)


def _dense(model: onnx.ModelProto, path: str | Path) -> onnx.ModelProto:
    """The model, expanded in place."""
    try:
        _expand(model)
    except ArtefactError as cause:
        raise ArtefactError(f"{path}: {cause.what}", expected=cause.expected, do=cause.do) from cause
    return model


# ---- pack


def pack(model: onnx.ModelProto) -> onnx.ModelProto:
    """A new model in which every weight that `pack_choices` finds to be 2:4 is packed; the others stay dense.

    A packed model gives an equal one; a model with nothing to pack gives a copy. Raises UsageError when the
    opset or the IR version knows no such function, or when the names of the format are taken by something
    else, and ArtefactError for a packed model that is damaged.
    """
    _require_names_free(model)
    packed = expand(model)
    chosen = {choice.weight: choice for choice in pack_choices(packed) if choice.reason is None}
    if not chosen:
        return packed
    opset = _require_functions(packed)
    graph = packed.graph
    taken = _names(graph)
    nodes: list[onnx.NodeProto] = []
    extra: list[TensorProto] = []
    for tensor in graph.initializer:
        choice = chosen.get(tensor.name)
        if choice is None or choice.axis is None:
            continue
        weight, axis = tensor.name, choice.axis
        array = numpy_helper.to_array(tensor)
        small = pack_weight(array, axis)
        _set_prop(
            packed, TENSOR_KEY + weight, _tensor_prop(tensor.data_type, bits_of(array, tensor.data_type))
        )
        names = [_free(f"{weight}.{part}", taken) for part in ("values", "meta", "shape")]
        _fill(tensor, names[0], small.values)
        extra.append(numpy_helper.from_array(small.meta, names[1]))
        extra.append(numpy_helper.from_array(np.array(small.shape, dtype=np.int64), names[2]))
        if axis == array.ndim - 1:
            nodes.append(helper.make_node(FUNCTION, names, [weight], domain=DOMAIN))
        else:
            moved = _free(f"{weight}.moved", taken)
            perm = [*range(axis), array.ndim - 1, *range(axis, array.ndim - 1)]
            nodes.append(helper.make_node(FUNCTION, names, [moved], domain=DOMAIN))
            nodes.append(helper.make_node("Transpose", [moved], [weight], perm=perm))
    graph.initializer.extend(extra)
    for index, node in enumerate(nodes):
        graph.node.insert(index, node)
    _set_prop(packed, FORMAT_KEY, FORMAT_VERSION)
    packed.functions.append(unpack_function(opset))
    packed.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return packed


def unpack_function(opset: int) -> onnx.FunctionProto:
    """The body of `sparse24::Unpack24(values, meta, shape)`, of operators that runtimes fold and that keep
    bits.

    Where and Pad are not used: onnxruntime has neither for float16 on the CPU, and would go through float32.
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


def _require_names_free(model: onnx.ModelProto) -> None:
    props = [prop.key for prop in model.metadata_props if _is_ours(prop.key)]
    domain = [
        *(f"the function {f.domain}::{f.name}" for f in model.functions if f.domain == DOMAIN),
        *(f"the operator set {DOMAIN}" for entry in model.opset_import if entry.domain == DOMAIN),
    ]
    if FORMAT_KEY in props and is_packed(model):
        return
    if domain or props:
        raise UsageError(
            f"The model already has {[*domain, *(f'metadata {key!r}' for key in props)][0]}, and is not "
            "packed.",
            expected=f"The domain {DOMAIN!r} and metadata keys that begin so were expected to be free.",
            do="Rename them, or leave the model dense.",
        )


def _require_functions(model: onnx.ModelProto) -> int:
    """The opset of the model, when it and the IR version have what the function is built of."""
    opset = max((entry.version for entry in model.opset_import if entry.domain in ONNX_DOMAINS), default=0)
    if opset < MIN_OPSET or model.ir_version < MIN_IR_VERSION:
        raise UsageError(
            f"The model has opset {opset} and IR version {model.ir_version}.",
            expected=(
                f"Opset {MIN_OPSET} and IR version {MIN_IR_VERSION} or later were expected, for its "
                "functions."
            ),
            do="Convert it with onnx.version_converter, or export it anew.",
        )
    return opset


def _names(graph: onnx.GraphProto) -> set[str]:
    """Every name of a tensor in a graph, subgraphs included."""
    names = {value.name for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer)}
    names.update(tensor.values.name for tensor in graph.sparse_initializer)
    for node in graph.node:
        names.update(node.input, node.output)
        for found in node.attribute:
            for inner in (*found.graphs, *([found.g] if found.HasField("g") else [])):
                names |= _names(inner)
    return names


def _free(name: str, taken: set[str]) -> str:
    """The name, numbered when it is taken; it is taken from now on."""
    free, n = name, 1
    while free in taken:
        free, n = f"{name}.{n}", n + 1
    taken.add(free)
    return free


# ---- expand


def packed_weights(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the weights that a packed model says it holds packed, in its own order; empty for another
    model.
    """
    if not is_packed(model):
        return ()
    keys = (prop.key for prop in model.metadata_props if _is_ours(prop.key))
    return tuple(key.removeprefix(TENSOR_KEY) for key in keys if key.startswith(TENSOR_KEY))


def expand(model: onnx.ModelProto) -> onnx.ModelProto:
    """A new model with dense weights, bit for bit those that were packed, and no trace of the packing.

    A model that is not packed gives a copy. Every weight is held against its shape, type and SHA-256 in the
    metadata. Raises ArtefactError when anything contradicts the format; no more memory is taken than twice
    what the model itself takes.
    """
    dense = onnx.ModelProto()
    dense.CopyFrom(model)
    _expand(dense)
    return dense


def _expand(dense: onnx.ModelProto) -> None:
    """`expand` in place; after an error the model is neither packed nor dense."""
    if not is_packed(dense):
        return
    wanted = _take_props(dense)
    _take_function(dense)
    graph = dense.graph
    initializers = _initializers(graph)
    readers = _readers(graph)
    fed = {value.name for value in graph.input}
    found: set[str] = set()
    gone: set[str] = set()
    nodes: list[int] = []
    moved_names: set[str] = set()
    for index, node in enumerate(graph.node):
        if not _is_call(node):
            continue
        if len(node.input) != 3 or len(node.output) != 1:
            raise damaged(f"a call has {len(node.input)} inputs and {len(node.output)} outputs", "3 and 1")
        parts = []
        for name in node.input:
            if name not in initializers or name in fed:
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
        if (made := _tensor_prop(data_type, bits)) != wanted[weight]:
            raise damaged(f"{weight!r} unpacks to {made}", wanted[weight])
        found.add(weight)
        gone.update(node.input[1:])
        _fill(parts[0], weight, bits)
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
        if not _is_ours(prop.key):
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
        _set_prop(model, key, value)
    return wanted


def _take_function(model: onnx.ModelProto) -> None:
    """Remove the function and its domain, after a look at whether it is the one of this format."""
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
        raise damaged(f"its function {DOMAIN}::{FUNCTION} is another one", "that of the format")
    others = [node for f in model.functions if f.domain != DOMAIN for node in _all_nodes(f.node)]
    inner = [node for outer in model.graph.node for node in _all_nodes(_nodes_in_subgraphs(outer))]
    if any(node.domain == DOMAIN for node in (*others, *inner)):
        raise damaged("a function or a subgraph calls it", "calls in the main graph only")
    if any(node.domain == DOMAIN and not _is_call(node) for node in model.graph.node):
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
    readers = Counter(name for node in graph.node for name in (*node.input, *names_in_subgraphs(node)))
    readers.update(value.name for value in graph.output)
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


# ---- protobuf


def _is_call(node: onnx.NodeProto) -> bool:
    return (node.domain, node.op_type) == (DOMAIN, FUNCTION)


def _is_ours(key: Any) -> bool:
    return isinstance(key, str) and key.startswith(f"{DOMAIN}.")


def _nodes_in_subgraphs(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """The nodes of the graphs in the attributes of a node, one level down."""
    for found in node.attribute:
        for graph in (*found.graphs, *([found.g] if found.HasField("g") else [])):
            yield from graph.node


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        yield from _all_nodes(_nodes_in_subgraphs(node))


def _set_prop(model: onnx.ModelProto, key: str, value: str) -> None:
    model.metadata_props.add(key=key, value=value)


def _tensor_prop(data_type: int, bits: Array) -> str:
    """What the metadata say of a weight: type, shape and the SHA-256 of its bytes, as stored when dense."""
    shape = ",".join(map(str, bits.shape))
    return f"{type_name(data_type)} {shape} {hashlib.sha256(bits.data).hexdigest()}"


def _fill(tensor: TensorProto, name: str, array: Array) -> None:
    """Give a tensor another name, shape and content; its notes stay."""
    for field in ("dims", "raw_data", "float_data", "int32_data"):
        tensor.ClearField(field)
    tensor.name = name
    tensor.dims.extend(array.shape)
    tensor.raw_data = array.tobytes()
