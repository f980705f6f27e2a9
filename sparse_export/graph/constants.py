"""What the constants of a graph are worth, also where nodes compute them before a layer multiplies by them.

Nothing is allocated on a graph's word alone: how much a node makes is worked out before it is computed, and
only operators of which that is known are.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from sparse_export.errors import ArtefactError

Array = np.ndarray[Any, Any]
Stored = onnx.TensorProto | onnx.SparseTensorProto
Read = Callable[[Stored], Array]
"""Gives the values of a stored tensor, as `array_of` does of one whose data are in the model."""

MAX_VALUES = 2**28  # of one computed tensor: 2 GiB in int64, the widest of the indices that unpack a weight
MAX_NODES = 256  # that compute one weight; unpacking and dequantizing takes about twenty
MAX_WORK = 2**26
"""Values that are computed for the layers of one graph, beside `WORK_PER_BYTE` for each byte it stores."""
WORK_PER_BYTE = 64
_WORK_OF_A_NODE = 2**13  # as long as it takes to compute so many values
_WORK_OF_A_STEP = 2**9  # likewise, to find a node
_MEASURED = 4  # times that the values of a weight are gone through once it is known
_KEPT_BYTES = 2**26  # of weights, for layers that share them
LARGEST_RANK = 64  # of a NumPy array

_RANDOM = frozenset(
    (
        "RandomNormal",
        "RandomUniform",
        "RandomNormalLike",
        "RandomUniformLike",
        "Multinomial",
        "Bernoulli",
    )
)
# Operators that make at most as many values as their largest input has.
_NO_LARGER = frozenset(
    (
        *("Identity", "Cast", "CastLike", "QuantizeLinear", "DequantizeLinear", "Clip"),
        *("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Shape", "Size"),
        *("Neg", "Abs", "Sqrt", "Reciprocal", "Exp", "Log", "Sign", "Not", "BitwiseNot"),
        *("Floor", "Ceil", "Round", "Relu", "Tanh", "Sigmoid"),
        *("ScatterElements", "ScatterND", "CumSum", "Trilu"),
        *("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare"),
    )
)
_BROADCAST = frozenset(
    (
        *("Add", "Sub", "Mul", "Div", "Pow", "Mod", "Max", "Min", "Sum", "Where"),
        *("And", "Or", "Xor", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitShift"),
        *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
    )
)
_QUANTIZING = frozenset(("QuantizeLinear", "DequantizeLinear"))
_QUANTIZING_OPSET = (
    21  # of which those since 10 are special cases; the reference implementation lacks some of them
)
# Operators of onnxruntime that are those of ONNX, for types that ONNX got later.
_AS_STANDARD = frozenset(("com.microsoft", name) for name in _QUANTIZING)
_DATA_COMES_FIRST = frozenset(
    (
        *("Identity", "Cast", "CastLike", "QuantizeLinear", "DequantizeLinear", "Clip", "Transpose"),
        *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Expand", "Tile", "Pad"),
        *("Gather", "GatherElements"),
    )
)


class _NotEvaluatedError(Exception):
    """A constant whose value is not worked out; the text says why."""


@dataclass(frozen=True, eq=False)
class Scope:
    """The names of one graph. Those of the graph around it are seen too.

    path: how it is reached from the model's graph, "" for that itself.  names: of the nodes, all different.
    overridable: stored values that the caller may replace.  constant: values of nodes that depend on no
    input.
    """

    path: str
    nodes: Sequence[onnx.NodeProto]
    names: Sequence[str]
    stored: dict[str, Stored]
    inputs: frozenset[str]
    overridable: frozenset[str]
    parent: Scope | None
    producers: dict[str, onnx.NodeProto] = field(default_factory=dict)
    constant: set[str] = field(default_factory=set)

    def find(self, name: str) -> tuple[Scope, onnx.NodeProto | Stored] | None:
        """Where a value comes from: a node, or what is stored under the name.

        None for inputs and the unknown.
        """
        scope: Scope | None = self
        while scope is not None:
            found = scope.stored.get(name) or scope.producers.get(name)
            if found is not None:
                return scope, found
            if name in scope.inputs:
                return None
            scope = scope.parent
        return None

    def is_constant(self, name: str) -> bool:
        """Does the value depend on no input? Values that the caller may override count as constant."""
        found = self.find(name)
        if found is None:
            return False
        scope, what = found
        return not isinstance(what, onnx.NodeProto) or name in scope.constant


def scopes(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> Iterator[Scope]:
    """The model's graph and every graph inside it (the branches of an If, the body of a Loop), outermost
    first.

    nodes: those of the model's graph, as they are to be read.
    """
    yield from _scopes(model.graph, nodes, None, "", overrides=model.ir_version >= 4)


def _scopes(
    graph: onnx.GraphProto,
    nodes: Sequence[onnx.NodeProto],
    parent: Scope | None,
    path: str,
    *,
    overrides: bool,
) -> Iterator[Scope]:
    stored: dict[str, Stored] = {tensor.name: tensor for tensor in graph.initializer}
    stored |= {tensor.values.name: tensor for tensor in graph.sparse_initializer}
    inputs = frozenset(value.name for value in graph.input)
    # Before IR version 4 every initializer had to be listed as an input, so the list says nothing.
    overridable = inputs.intersection(stored) if overrides else frozenset[str]()
    names = _told_apart(nodes)
    scope = Scope(path, nodes, names, stored, inputs - stored.keys(), overridable, parent)
    for node in nodes:
        is_constant = _is_function_of_inputs(node) and all(
            not name or scope.is_constant(name) for name in node.input
        )
        for name in node.output:
            scope.producers.setdefault(name, node)  # the first, so that a wrong graph cannot make a circle
            if is_constant:
                scope.constant.add(name)
    yield scope
    for node, known_as in zip(nodes, names, strict=True):
        for name, inner in _subgraphs(node):
            below = f"{path}{known_as}/{name}/"
            yield from _scopes(inner, inner.node, scope, below, overrides=False)


def _subgraphs(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.GraphProto]]:
    for found in node.attribute:
        if found.HasField("g"):
            yield found.name, found.g
        yield from ((f"{found.name}{i}", graph) for i, graph in enumerate(found.graphs))


def _is_function_of_inputs(node: onnx.NodeProto) -> bool:
    if any(True for _ in _subgraphs(node)):
        return False
    if is_standard(node):
        return node.op_type not in _RANDOM and (bool(node.input) or node.op_type == "Constant")
    return bool(node.input)


def is_standard(node: onnx.NodeProto) -> bool:
    """Is it an operator of ONNX itself, or the same under another name?"""
    return node.domain in ("", "ai.onnx") or (node.domain, node.op_type) in _AS_STANDARD


def node_name(node: onnx.NodeProto) -> str:
    """The name of a node, or of what it makes."""
    return node.name or next(iter(node.output), "") or node.op_type


def _told_apart(nodes: Sequence[onnx.NodeProto]) -> list[str]:
    """Names of nodes, the second of one name with `#2` behind it: ONNX does not ask for different ones."""
    taken = {node_name(node) for node in nodes}
    n_seen: Counter[str] = Counter()
    names = []
    for node in nodes:
        name = known_as = node_name(node)
        n_seen[name] += 1
        while n_seen[name] > 1 and known_as in taken:
            known_as = f"{name}#{n_seen[name]}"
            n_seen[name] += known_as in taken
        taken.add(known_as)
        names.append(known_as)
    return names


def attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    """An integer attribute of a node. Raises ArtefactError when it is something else."""
    for found in node.attribute:
        if found.name == name:
            if found.type not in (onnx.AttributeProto.INT, onnx.AttributeProto.UNDEFINED):
                kind = onnx.AttributeProto.AttributeType.Name(found.type)
                raise ArtefactError(
                    f"The attribute {name} of the {node.op_type} {node_name(node)} is of type {kind}.",
                    expected="An integer was expected.",
                    do="Export the model again.",
                )
            return int(found.i)
    return default


@dataclass(frozen=True, kw_only=True)
class Step:
    """One node between a layer and its stored weight, seen along the way of the weight.

    shape, dtype: of the weight before this node.  after: its shape after it.  masked_by: the value whose
    zeros the node puts into the weight, None when it puts none.  zero_point: a quantized zero is not stored
    as 0.
    """

    node: onnx.NodeProto
    source: str
    shape: tuple[int, ...]
    after: tuple[int, ...]
    dtype: str
    masked_by: str | None = None
    zero_point: bool = False


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A value that depends on no input.

    stored: name of the tensor it is made of; steps: from the layer up to it.  measured: what is counted in
    its values, for layers that share it.
    """

    values: Array
    stored: str
    steps: tuple[Step, ...]
    sparse: bool
    overridable: bool
    measured: dict[object, Any] = field(default_factory=dict, compare=False, repr=False)

    def stored_axis(self, axis: int) -> int | None:
        """Which axis of the stored tensor an axis of the value is; None where it is not one."""
        for step in self.steps:
            if step.node.op_type == "Transpose":
                axis = permutation(step.node, len(step.shape))[axis]
            elif step.shape != step.after or step.node.op_type not in _NO_LARGER | _BROADCAST:
                return None
        return axis


@dataclass(frozen=True, kw_only=True)
class Unevaluated:
    """A constant whose value is not worked out. why: the rest of a sentence that begins with the weight."""

    why: str


Key = tuple[Scope, str]


class Evaluator:
    """Works out the constants of one graph, and no more of them than what the graph stores is worth: else a
    small file could ask for hours.

    Args:
        model: whose opset counts, and whose stored bytes.
        read: gives the values of what it stores.
    """

    def __init__(self, model: onnx.ModelProto, read: Read) -> None:
        self._read = read
        self._opset = next(
            (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1
        )
        stored = (*model.graph.initializer, *model.graph.sparse_initializer)
        self._most = MAX_WORK + WORK_PER_BYTE * sum(map(_n_stored, stored))
        self._done = 0
        self._kept: OrderedDict[Key, Constant | Unevaluated] = OrderedDict()
        self._kept_bytes = 0

    def evaluate(self, scope: Scope, name: str) -> Constant | Unevaluated:
        """Work out a constant, which `scope.is_constant` has said it is.

        Raises ArtefactError when a stored tensor or a node is invalid.
        """
        found = scope.find(name)
        assert found is not None, "a constant comes from somewhere"
        key = (found[0], name)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        worked_out: Constant | Unevaluated
        try:
            with np.errstate(all="ignore"):  # NaN and overflow are findings about a weight, not about us
                worked_out = self._evaluate(scope, name)
        except _NotEvaluatedError as cause:
            worked_out = Unevaluated(why=str(cause))
        self._keep(key, worked_out)
        return worked_out

    def _keep(self, key: Key, worked_out: Constant | Unevaluated) -> None:
        self._kept[key] = worked_out
        self._kept_bytes += _n_bytes(worked_out)
        while self._kept_bytes > _KEPT_BYTES:
            self._kept_bytes -= _n_bytes(self._kept.popitem(last=False)[1])

    def _spend(self, n_values: int) -> None:
        """Count work before it is done."""
        self._done += n_values
        if self._done > self._most:
            raise _NotEvaluatedError(
                f"is computed, and the weights of the graph take more than {self._most:,} values to work out, "
                "of which none is stored"
            )

    def _evaluate(self, scope: Scope, name: str) -> Constant:
        order = _sources(scope, name, self._spend)
        waiting = Counter(key for _, _, sources in order for key in sources if key)
        values: dict[Key, Array] = {}
        steps: dict[Key, tuple[Step, Key]] = {}
        for key, what, sources in order:
            if not isinstance(what, onnx.NodeProto):
                values[key] = self._read(what)
                continue
            inputs = [values[source] if source else None for source in sources]
            values[key] = _computed(what, key[1], inputs, self._opset, self._spend, self._read)
            main = _main_input(what, inputs, values[key])
            if main is not None and (source := sources[main]):
                steps[key] = _step(what, main, inputs, values[key]), source
            for gone in filter(None, sources):
                waiting[gone] -= 1
                if not waiting[gone]:
                    values.pop(gone, None)
        target = order[-1][0]
        if steps:
            self._spend(_MEASURED * values[target].size)
        way: list[Step] = []
        key = target
        while key in steps:
            step, key = steps[key]
            way.append(step)
        owner, stored = key
        return Constant(
            values=values[target],
            stored=stored,
            steps=tuple(way),
            sparse=isinstance(owner.stored.get(stored), onnx.SparseTensorProto),
            overridable=any(source in at.overridable for at, source in (entry[0] for entry in order)),
        )


def _n_stored(tensor: Stored) -> int:
    """Bytes that a stored tensor takes, in the model or in the file that it names."""
    if isinstance(tensor, onnx.TensorProto) and uses_external_data(tensor):
        return int(ExternalDataInfo(tensor).length or 0)
    return int(tensor.ByteSize())


def _n_bytes(worked_out: Constant | Unevaluated) -> int:
    return worked_out.values.nbytes if isinstance(worked_out, Constant) else 0


Source = tuple[Key, onnx.NodeProto | Stored, list[Key | None]]


def _sources(scope: Scope, name: str, spend: Callable[[int], None]) -> list[Source]:
    """A value and all that it is made of, makers before what they make, each with what it needs."""
    order: list[Source] = []
    seen: set[Key] = set()
    n_nodes = 0
    stack: list[tuple[Scope, str, Source | None]] = [(scope, name, None)]
    while stack:
        at, wanted, done = stack.pop()
        if done is not None:
            order.append(done)
            continue
        found = at.find(wanted)
        assert found is not None, "a constant comes from somewhere"
        owner, what = found
        key = (owner, wanted)
        if key in seen:
            continue
        seen.add(key)
        if not isinstance(what, onnx.NodeProto):
            order.append((key, what, []))
            continue
        _require_known(what)
        spend(_WORK_OF_A_STEP)
        n_nodes += 1
        if n_nodes > MAX_NODES:
            raise _NotEvaluatedError(f"is computed by more than {MAX_NODES} nodes")
        places = [owner.find(source) if source else None for source in what.input]
        needed = [
            None if place is None else (place[0], source)
            for place, source in zip(places, what.input, strict=True)
        ]
        stack.append((owner, wanted, (key, what, needed)))
        stack.extend((*key, None) for key in needed if key)
    return order


def _is_known(node: onnx.NodeProto) -> bool:
    known = node.op_type in _NO_LARGER | _BROADCAST | _COUNTED.keys() | {"Constant"}
    return is_standard(node) and known


def _require_known(node: onnx.NodeProto) -> None:
    if not _is_known(node):
        operator = node.op_type if is_standard(node) else f"{node.domain}::{node.op_type}"
        raise _NotEvaluatedError(f"is computed by {operator}, which is not evaluated here")


def array_of(tensor: Stored) -> Array:
    """The values of a stored tensor; a sparse one is filled up.

    Raises ArtefactError when they do not make sense.
    """
    try:
        if isinstance(tensor, onnx.SparseTensorProto):
            return _dense(tensor)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ArtefactError(
                f"The data of {tensor.name} lies in a file beside the model and was not read.",
                expected="A model with its weights was expected.",
                do="Load it with its external data.",
            )
        return numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, AttributeError) as cause:
        name = tensor.values.name if isinstance(tensor, onnx.SparseTensorProto) else tensor.name
        raise ArtefactError(
            f"The tensor {name} cannot be read: {_first_line(cause)}.",
            expected=f"Data that fills the shape {_shown(tensor.dims)} was expected.",
            do="Copy the model again, or export it again.",
        ) from cause


def nonzeros(values: Array) -> Array:
    """Which entries are not zero, as bool: -0.0 is zero, NaN is not."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        found: Array = values != 0
    return found


def _shown(dims: Sequence[int]) -> str:
    shown = "x".join(map(str, dims[:LARGEST_RANK])) or "of a scalar"
    return shown if len(dims) <= LARGEST_RANK else f"{shown}x…"


def _dense(tensor: onnx.SparseTensorProto) -> Array:
    shape = tuple(tensor.dims)
    _require_bounded(math.prod(shape))
    values, indices = array_of(tensor.values), array_of(tensor.indices)
    flat = np.zeros(math.prod(shape), dtype=values.dtype)
    flat[indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), shape)] = values
    return flat.reshape(shape)


def _require_bounded(n_values: int) -> None:
    if n_values > MAX_VALUES:
        raise _NotEvaluatedError(f"takes {n_values:,} values to work out, more than {MAX_VALUES:,}")


def _first_line(cause: BaseException) -> str:
    return str(cause).strip().partition("\n")[0].rstrip(".") or type(cause).__name__


def permutation(node: onnx.NodeProto, rank: int) -> tuple[int, ...]:
    perm = next((tuple(found.ints) for found in node.attribute if found.name == "perm"), ())
    return tuple(int(axis) % rank for axis in perm) if perm else tuple(reversed(range(rank)))


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
        raise ValueError(f"{values.size} numbers tell the shape of a tensor")
    return tuple(int(value) for value in values.ravel())


def _n_made(node: onnx.NodeProto, inputs: Sequence[Array]) -> int:
    if node.op_type in _BROADCAST:
        return math.prod(np.broadcast_shapes(*(values.shape for values in inputs)))
    if node.op_type in _COUNTED:
        return _COUNTED[node.op_type](node, inputs)
    return max((values.size for values in inputs), default=0)


def n_made(node: onnx.NodeProto, inputs: Sequence[Array | None]) -> int | None:
    """Work out how many values a node makes before it does.

    Args:
        node: of any operator.
        inputs: what it gets.

    Returns:
        At least as many as it makes; None where that is not known.
    """
    given = [values for values in inputs if values is not None]
    if not _is_known(node) or len(given) < len(inputs):
        return None
    try:
        return _n_made(node, given)
    except (ValueError, IndexError, TypeError, ArithmeticError):  # somebody's graph
        return None


def _computed(
    node: onnx.NodeProto,
    output: str,
    inputs: Sequence[Array | None],
    opset: int,
    spend: Callable[[int], None],
    read: Read,
) -> Array:
    """What a node makes of its inputs, under the name `output`. spend: is told how many values it takes."""
    from onnx.reference.op_run import RuntimeContextError, RuntimeImplementationError, RuntimeTypeError

    given = [values for values in inputs if values is not None]
    try:
        if node.op_type == "Constant":
            return _value_of_constant(node, read)
        if node.op_type == "Cast" and attribute(node, "to", 0) == onnx.TensorProto.STRING:
            raise _NotEvaluatedError("is computed as text")
        n_values = _n_made(node, given)
        _require_bounded(n_values)
        spend(_WORK_OF_A_NODE + n_values)
        if node.op_type in ("ScatterElements", "GatherElements"):
            return _along_axis(node, given)
        return _by_reference(node, output, inputs, opset)
    except (ArtefactError, _NotEvaluatedError):
        raise
    except (
        NotImplementedError,
        RuntimeContextError,
        RuntimeImplementationError,
        RuntimeTypeError,
    ) as cause:
        raise _NotEvaluatedError(
            f"is computed by {node.op_type}, which is not evaluated here: {_first_line(cause)}"
        ) from cause
    except Exception as cause:  # a wrong graph makes the reference implementation fail in any way
        raise _NotEvaluatedError(
            f"is computed by the {node.op_type} {node_name(node)}, which fails: "
            f"{type(cause).__name__}: {_first_line(cause)}"
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
    if plain.op_type in _QUANTIZING:
        opset = max(opset, _QUANTIZING_OPSET)
    names = list(dict.fromkeys(name for name in node.input if name))
    function = helper.make_function(
        "", "one", names, list(filter(None, node.output)), [plain], [helper.make_opsetid("", opset)]
    )
    feeds = {name: values for name, values in zip(node.input, inputs, strict=True) if name}
    (found,) = ReferenceEvaluator(function).run([output], feeds, attributes={})
    return np.asarray(found)


def _main_input(node: onnx.NodeProto, inputs: Sequence[Array | None], output: Array) -> int | None:
    """Which input the weight comes in by: the data, or the one with most to say that is no mask."""
    if node.op_type in _DATA_COMES_FIRST and inputs:
        return 0
    candidates = [i for i, values in enumerate(inputs) if values is not None and values.dtype == output.dtype]
    if len(candidates) < 2:
        return candidates[0] if candidates else None

    def has_more(i: int) -> tuple[bool, int]:
        values = inputs[i]
        assert values is not None
        return not _is_zeros_and_ones(values), int(np.count_nonzero(values))

    return max(candidates, key=has_more)


def _is_zeros_and_ones(values: Array) -> bool:
    return bool(((values == 0) | (values == 1)).all())


def _step(node: onnx.NodeProto, main: int, inputs: Sequence[Array | None], output: Array) -> Step:
    before = inputs[main]
    assert before is not None
    masked_by = None
    if node.op_type in ("Mul", "Where") and before.shape == output.shape:
        mask = 0 if node.op_type == "Where" else 1 - main
        by = inputs[mask]
        if by is not None and not by.all() and np.count_nonzero(output) < np.count_nonzero(before):
            masked_by = node.input[mask]
    dequantizes = node.op_type == "DequantizeLinear" and len(inputs) > 2 and inputs[2] is not None
    return Step(
        node=node,
        source=node.input[main],
        shape=before.shape,
        after=output.shape,
        dtype=before.dtype.name,
        masked_by=masked_by,
        zero_point=dequantizes and bool((inputs[2] != 0).any()),  # type: ignore[union-attr]
    )
