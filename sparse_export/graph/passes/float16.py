"""The same graph in 16-bit floats: float16 or bfloat16 inside, float32 at its inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sparse_export.errors import GateFailed, UsageError, first_line
from sparse_export.graph.names import free_name, graphs_of, inner_graphs, names_of_values
from sparse_export.graph.nodes import ONNX_DOMAINS
from sparse_export.graph.passes.guarded_transposes import guard_transposes
from sparse_export.graph.passes.limits import Limits, limits_of
from sparse_export.signature import Array

__all__ = ["HALF_TYPES", "in_half", "value_types", "with_bfloat16_emulated"]

Half = Literal["fp16", "bf16"]
HALF_TYPES: dict[str, int] = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_LARGEST = {"fp16": 65504.0, "bf16": float.fromhex("0x1.fep127")}
_NAMES = {"fp16": "float16", "bf16": "bfloat16"}
BFLOAT16_OPSET = 22
_LOWEST_OPSET = 20
_IR_VERSION = 10  # the first that belongs to opset 22
# By index of a node: by position of an input the value to take in its place, None for its own; outputs.
_Places = dict[int, tuple[dict[int, str | None], set[int]]]
# Operators with float inputs that stay float32 in ONNX whatever the data are: of Resize roi and scales, by
# position.
_KEPT_FLOAT = {"Resize": (1, 2)}
_WANT_FLOAT = ("Upsample", "QuantizeLinear", "DequantizeLinear")


def in_half(model: onnx.ModelProto, precision: Half) -> onnx.ModelProto:
    """A new model that computes in float16 or bfloat16 between a Cast at each float32 input and output.

    Weights are rounded to nearest, ties to even; a zero stays a zero, so that a 2:4 weight stays 2:4. A limit
    beyond the type's range, like the lowest value of a mask, becomes the type's own; -inf stays. Branches and
    loops compute in float16 like the graph around them; bfloat16 is refused there. Raises GateFailed for a
    weight that float16 cannot hold, UsageError for a graph with functions, or operators that want float32.
    """
    half = onnx.ModelProto()
    half.CopyFrom(model)
    graph = half.graph
    _require_plain(half, precision)
    if precision == "bf16":
        _raise_opset(half)
    wanted = HALF_TYPES[precision]
    limits = limits_of(graph)
    kept = _kept_float(graph)
    narrow = _without_half(half, wanted, kept)
    if exact := _exact_constants(graph, narrow):
        kept |= exact
        narrow = _without_half(half, wanted, kept)
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in kept:
            tensor.CopyFrom(_rounded(tensor, tensor.name, precision, limits))
    for one in graphs_of(graph):
        for node in one.node:
            _round_attributes(node, precision, limits)
        del one.value_info[:]  # of the types before
    for one in inner_graphs(graph.node):
        for tensor in one.initializer:
            if tensor.data_type == TensorProto.FLOAT:
                tensor.CopyFrom(_rounded(tensor, tensor.name, precision, limits))
        for value in (*one.input, *one.output):
            if value.type.tensor_type.elem_type == TensorProto.FLOAT:
                value.type.tensor_type.elem_type = wanted
    before = [
        _cast_at(graph, value.name, wanted, is_input=True)
        for value in graph.input
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    ]
    after = [
        _cast_at(graph, value.name, TensorProto.FLOAT, is_input=False)
        for value in graph.output
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    ]
    taken = names_of_values(graph)
    for one, places in reversed(list(zip(graphs_of(graph), narrow, strict=True))):  # the inner ones first
        nodes = _in_float32(one, places, wanted, taken)
        _set_nodes(one, [*before, *nodes, *after] if one is graph else nodes)
    _drop_casts(graph, narrow)
    guard_transposes(graph, taken)
    _require_consistent(half, precision)
    return half


def _round_attributes(node: onnx.NodeProto, precision: Half, limits: Limits) -> None:
    """Take the tensors that a node holds, and the type that it casts to, to the smaller type, in place."""
    _tell_value(node)
    for attribute in node.attribute:
        if attribute.HasField("t") and attribute.t.data_type == TensorProto.FLOAT:
            attribute.t.CopyFrom(_rounded(attribute.t, node.output[0], precision, limits))
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = HALF_TYPES[precision]


def _set_nodes(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _without_half(model: onnx.ModelProto, wanted: int, kept: Collection[str]) -> list[_Places]:
    """Positions of float32 inputs and outputs that an operator does not have in a 16-bit type, like Range's.

    For each graph as `graphs_of` orders them, by index of the node; inputs that stay float32 in any case, and
    the tensors that are `kept` so, are not among them.
    """
    graph = onnx.shape_inference.infer_shapes(model).graph
    versions = {entry.domain: entry.version for entry in model.opset_import}
    type_name = f"tensor({_NAMES['fp16' if wanted == TensorProto.FLOAT16 else 'bf16']})"
    found = []
    for one, kinds in _typed(graph, {}):
        kinds = {name: kind for name, kind in kinds.items() if name not in kept}
        found.append(_narrow(one.node, kinds, versions, type_name))
    return found


def _typed(
    graph: onnx.GraphProto, around: dict[str, int]
) -> Iterator[tuple[onnx.GraphProto, dict[str, int]]]:
    """A graph and those inside it, each with the types of the values that it sees."""
    kinds = around | {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        kinds[value.name] = value.type.tensor_type.elem_type
    yield graph, kinds
    for node in graph.node:
        for found in node.attribute:
            for inner in (*found.graphs, *([found.g] if found.HasField("g") else [])):
                yield from _typed(inner, kinds)


def _narrow(
    nodes: Sequence[onnx.NodeProto], kinds: dict[str, int], versions: dict[str, int], type_name: str
) -> _Places:
    found: _Places = {}
    integers = {
        node.output[0]: node.input[0]
        for node in nodes
        if node.op_type == "Cast" and kinds.get(node.input[0]) not in (None, TensorProto.FLOAT)
    }
    for index, node in enumerate(nodes):
        try:
            schema = onnx.defs.get_schema(node.op_type, versions.get(node.domain, 1), node.domain)
        except onnx.defs.SchemaError:
            continue  # of another domain
        allowed = {one.type_param_str: set(one.allowed_type_strs) for one in schema.type_constraints}
        ends = []
        for names, formal in ((node.input, schema.inputs), (node.output, schema.outputs)):
            narrow = set()
            for at, name in enumerate(names):
                kind = formal[min(at, len(formal) - 1)].type_str
                if kinds.get(name) == TensorProto.FLOAT and type_name not in allowed.get(kind, {kind}):
                    narrow.add(at)
            ends.append(narrow)
        ends[0] -= set(_kept_positions(node))
        if ends[0] or (ends[1] and node.op_type != "Cast"):
            found[index] = ({at: integers.get(node.input[at]) for at in ends[0]}, ends[1])
    return found


def _in_float32(
    graph: onnx.GraphProto, narrow: _Places, wanted: int, taken: set[str]
) -> list[onnx.NodeProto]:
    """The nodes, with a Cast before each of the given inputs and behind each of the given outputs.

    A size that was cast from an integer is cast from it again: in 16 bits it would be another one from 2,048 on,
    and TensorRT does not take it for a size.
    """
    nodes: list[onnx.NodeProto] = []

    def renamed(names: Any, at: int) -> tuple[str, str]:
        outer = names[at]
        names[at] = free_name(f"{outer}_float32", taken)
        taken.add(names[at])
        return outer, names[at]

    for index, node in enumerate(graph.node):
        inputs, outputs = narrow.get(index, ({}, set()))
        for at, source in sorted(inputs.items()):
            outer, inner = renamed(node.input, at)
            nodes.append(
                helper.make_node("Cast", [source or outer], [inner], name=inner, to=TensorProto.FLOAT)
            )
        nodes.append(node)
        for at in sorted(outputs):
            outer, inner = renamed(node.output, at)
            nodes.append(helper.make_node("Cast", [inner], [outer], name=inner, to=wanted))
    return nodes


def _tell_value(node: onnx.NodeProto) -> None:
    """Give a node that makes float32 without a tensor to tell it that tensor, in place."""
    values: Array | None = None
    if node.op_type == "ConstantOfShape" and not node.attribute:  # 0.0 by ONNX's default
        values = np.zeros(1, np.float32)
    elif node.op_type == "Constant":
        for found in node.attribute:
            if found.name in ("value_float", "value_floats"):
                values = np.array(found.f if found.name == "value_float" else found.floats, np.float32)
    if values is not None:
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(values)))


def _raise_opset(model: onnx.ModelProto) -> None:
    """To the first opset in which convolutions and pools take bfloat16.

    From 20 to 22 operators gain types; only GroupNormalization changes what it means (onnx, Operators
    changelog).
    """
    for entry in model.opset_import:
        if entry.domain in ONNX_DOMAINS and entry.version < BFLOAT16_OPSET:
            if entry.version < _LOWEST_OPSET or any(
                n.op_type == "GroupNormalization" for n in model.graph.node
            ):
                raise UsageError(
                    f"The graph has opset {entry.version} and cannot be taken to {BFLOAT16_OPSET} as it is.",
                    expected=(
                        f"Opset {_LOWEST_OPSET} or later, without GroupNormalization, was expected "
                        "for bfloat16."
                    ),
                    do="Build it as fp16.",
                )
            entry.version = BFLOAT16_OPSET
    model.ir_version = max(model.ir_version, _IR_VERSION)


def _require_plain(model: onnx.ModelProto, precision: Half) -> None:
    inner = [
        node.name or node.op_type
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.graphs or attribute.HasField("g")
    ]
    below = [
        node.name or node.op_type
        for graph in inner_graphs(model.graph.node)
        for node in graph.node
        if node.op_type in _WANT_FLOAT or _kept_positions(node)
    ]
    constants = _constants(model.graph)
    kept = [
        node.name or node.op_type
        for node in model.graph.node
        if node.op_type in _WANT_FLOAT
        or any(name not in constants for name in map(node.input.__getitem__, _kept_positions(node)))
    ]
    problems = [
        *(f"the function {one.domain}::{one.name}" for one in model.functions),
        *(f"subgraphs of {name}" for name in inner if precision == "bf16"),
        *(f"{name}, which wants float32" for name in (*kept, *below)),
    ]
    if problems:
        raise UsageError(
            f"The graph holds {problems[0]}.",
            expected="Plain nodes were expected, whose types follow from their inputs.",
            do="Build it as fp16 or fp32." if inner and precision == "bf16" else "Build it as fp32.",
        )


def _kept_positions(node: onnx.NodeProto) -> list[int]:
    """Positions of inputs that are given and stay float32."""
    return [at for at in _KEPT_FLOAT.get(node.op_type, ()) if at < len(node.input) and node.input[at]]


def _constants(graph: onnx.GraphProto) -> dict[str, TensorProto]:
    """Stored values by name, those of Constant nodes too."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            held = onnx.NodeProto()
            held.CopyFrom(node)
            _tell_value(held)
            stored |= {name: held.attribute[0].t for name in node.output if held.attribute[0].HasField("t")}
    return stored


def _kept_float(graph: onnx.GraphProto) -> set[str]:
    """Give each input that stays float32 a tensor of its own, in place; the names of these tensors."""
    return _with_copies(graph, [(node, at) for node in graph.node for at in _kept_positions(node)])


def _exact_constants(graph: onnx.GraphProto, narrow: Sequence[_Places]) -> set[str]:
    """As `_kept_float`, of constants that an operator without the type takes: Range by 0.1 gives another number
    of values where that is rounded.
    """
    constants = _constants(graph)
    return _with_copies(
        graph,
        [
            (one.node[index], at)
            for one, places in zip(graphs_of(graph), narrow, strict=True)
            for index, (inputs, _) in places.items()
            for at in inputs
            if one.node[index].input[at] in constants
        ],
    )


def _with_copies(graph: onnx.GraphProto, uses: Sequence[tuple[onnx.NodeProto, int]]) -> set[str]:
    """Give inputs, by node and position, constants of their own, in place; the names of these."""
    constants, taken = _constants(graph), names_of_values(graph)
    kept: dict[str, str] = {}
    for node, at in uses:
        name = node.input[at]
        if name not in kept:
            kept[name] = free_name(f"{name}_float32", taken)
            taken.add(kept[name])
            graph.initializer.add().CopyFrom(constants[name])
            graph.initializer[-1].name = kept[name]
        node.input[at] = kept[name]
    _drop_unused(graph, kept)
    return set(kept.values())


def _drop_casts(graph: onnx.GraphProto, narrow: Sequence[_Places]) -> None:
    """Remove the Casts of integers that are cast to float32 now and that nobody else reads, in place."""
    sources = {name for places in narrow for inputs, _ in places.values() for name in inputs.values() if name}
    read = {name for one in graphs_of(graph) for node in one.node for name in node.input}
    read |= {value.name for one in graphs_of(graph) for value in one.output}
    for one in graphs_of(graph):
        gone = [
            node
            for node in one.node
            if node.op_type == "Cast" and node.input[0] in sources and node.output[0] not in read
        ]
        for node in gone:
            one.node.remove(node)


def _drop_unused(graph: onnx.GraphProto, names: Collection[str]) -> None:
    """Remove those of the constants that nobody reads, in place."""
    read = {name for one in graphs_of(graph) for node in one.node for name in node.input}
    read |= {value.name for value in graph.output}
    gone = set(names) - read
    tensors = [tensor for tensor in graph.initializer if tensor.name in gone]
    nodes = [node for node in graph.node if node.op_type == "Constant" and gone.issuperset(node.output)]
    for tensor in tensors:
        graph.initializer.remove(tensor)
    for node in nodes:
        graph.node.remove(node)


def _rounded(tensor: TensorProto, name: str, precision: Half, limits: Limits) -> TensorProto:
    """The tensor in the smaller type. name: of the value in the graph."""
    array = numpy_helper.to_array(tensor)
    dtype = helper.tensor_dtype_to_np_dtype(HALF_TYPES[precision])
    with np.errstate(over="ignore"):
        rounded = array.astype(dtype)
    lost = np.isfinite(array) & ~np.isfinite(rounded.astype(np.float32))
    if lost.any():
        largest = _LARGEST[precision]
        limit = lost & limits(name, array)
        rounded = np.where(limit, np.where(array < 0, -largest, largest).astype(dtype), rounded)
        lost &= ~limit
    if lost.any():
        raise GateFailed(
            f"{tensor.name or 'A constant'} holds {float(np.abs(array[lost]).max()):.4g}, which "
            f"{_NAMES[precision]} cannot.",
            expected="Weights within its range were expected.",
            do="Build as bf16 or fp32, or look at the training.",
        )
    result: TensorProto = numpy_helper.from_array(rounded, tensor.name)
    return result


def _cast_at(graph: onnx.GraphProto, name: str, to: int, *, is_input: bool) -> onnx.NodeProto:
    """The Cast that stands at an input or output of the graph; whoever used that value uses its inner
    form.
    """
    inner = free_name(f"{name}_{'inside' if is_input else 'outside'}", names_of_values(graph))
    for one in graphs_of(graph):
        for node in one.node:
            node.input[:] = [inner if used == name else used for used in node.input]
            node.output[:] = [inner if made == name else made for made in node.output]
        for value in one.output if one is not graph else ():
            value.name = inner if value.name == name else value.name
    ends = ([name], [inner]) if is_input else ([inner], [name])
    return helper.make_node("Cast", *ends, name=f"cast_{name}", to=to)


def _require_consistent(model: onnx.ModelProto, precision: Half) -> None:
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as cause:
        raise UsageError(
            f"The graph cannot be {_NAMES[precision]}: {first_line(cause)}.",
            expected="Operators that take that type were expected.",
            do="Build it as fp32.",
        ) from cause


# ---- bfloat16 where nothing computes in it


def value_types(model: onnx.ModelProto) -> frozenset[int]:
    """The types of weights and constants of the main graph, and those that its values are cast to."""
    nodes = model.graph.node
    constants = [a.t.data_type for node in nodes for a in node.attribute if a.HasField("t")]
    casts = [a.i for node in nodes if node.op_type == "Cast" for a in node.attribute if a.name == "to"]
    return frozenset((*(tensor.data_type for tensor in model.graph.initializer), *constants, *casts))


def with_bfloat16_emulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """A new model that computes in float32 and rounds every value to bfloat16, as a GPU that sums in float32
    does.

    For runtimes without bfloat16 arithmetic, as onnxruntime has none on the CPU.
    """
    emulated = onnx.ModelProto()
    emulated.CopyFrom(model)
    graph = emulated.graph
    for tensor in graph.initializer:
        _widen(tensor)
    nodes = []
    rounds = _rounds(model)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _widen(attribute.t)
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
        outputs = list(node.output)
        nodes.append(node)
        for index, name in enumerate(outputs):
            if name and rounds(name):
                raw, small = f"{name}.unrounded", f"{name}.bfloat16"
                node.output[index] = raw
                nodes.append(helper.make_node("Cast", [raw], [small], to=TensorProto.BFLOAT16))
                nodes.append(helper.make_node("Cast", [small], [name], to=TensorProto.FLOAT))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    del graph.value_info[:]
    return emulated


def _rounds(model: onnx.ModelProto) -> Callable[[str], bool]:
    """Is a value of the model bfloat16?"""
    known = onnx.shape_inference.infer_shapes(model).graph
    halves = {
        value.name for value in known.value_info if value.type.tensor_type.elem_type == TensorProto.BFLOAT16
    }
    return halves.__contains__


def _widen(tensor: TensorProto) -> None:
    if tensor.data_type == TensorProto.BFLOAT16:
        tensor.CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
        )
