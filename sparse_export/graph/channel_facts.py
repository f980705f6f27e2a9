"""What a graph says about the channels of its values: which go together, which are constant, who reads them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from sparse_export.errors import GateFailed
from sparse_export.graph.constants import array_of
from sparse_export.graph.verify import FLOATS

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]

# Free sizes of the inputs are replaced by primes that no layer has, so that a size they are part of is known.
_FREE_SIZES = (7919, 7907, 7901, 7883, 7879, 7877, 7873, 7867)
_SMALL = 1024
_LARGEST_RESHAPE = 1 << 24
_REAL = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))

_ONE_TO_ONE = frozenset(
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
_BROADCAST = frozenset(["Add", "Div", "Max", "Mean", "Min", "Mul", "PRelu", "Pow", "Sub", "Sum"])
_REDUCE = frozenset(
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


@dataclass(frozen=True, kw_only=True)
class Value:
    """The channels of a tensor along one of its axes.

    slots: the number of each channel in the union; two values may share them.  constant: per channel the one
    number that all its elements always are, NaN where there is none.
    """

    axis: int
    slots: Array
    constant: Array


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A Conv, ConvTranspose, Gemm or MatMul that sums over the channels of its input.

    w_OIK: its weight as outputs, inputs, and whatever is summed over besides.  in_axis, out_axis: of the weight
    as it is stored.  scale: what the product is multiplied by.  reads_OI: whether an output channel has a weight
    other than zero for an input channel.  foldable: inputs whose contribution is known and the same everywhere
    in the output.  constant: of the inputs.  groups: 1, or the groups of a convolution, whose channels leave
    only as whole groups; then in_slots is empty.
    """

    node: onnx.NodeProto
    weight: str
    in_axis: int
    out_axis: int
    in_slots: Array
    out_slots: Array
    w_OIK: Array  # noqa: N815 - shape suffix
    reads_OI: Array  # noqa: N815 - shape suffix
    foldable: Array
    constant: Array
    scale: float = 1.0
    groups: int = 1

    def contribution(self, inputs: Array) -> Array:
        """Float64 (outputs,): what these constant inputs add. inputs: numbers of foldable ones."""
        inputs = inputs[self.constant[inputs] != 0]
        sums_OI = self.w_OIK[:, inputs].sum(axis=2, dtype=np.float64)
        added: Array = self.scale * (sums_OI @ self.constant[inputs])
        return added


@dataclass(kw_only=True)
class Graph:
    """A model taken apart: nodes, and the constants as arrays. Constant nodes have become arrays."""

    model: onnx.ModelProto
    nodes: list[onnx.NodeProto]
    arrays: dict[str, Array]

    @staticmethod
    def of(model: onnx.ModelProto) -> Graph:
        """A copy; a constant that callers may override is not among the arrays. Raises ArtefactError for a damaged one."""
        given = {value.name for value in model.graph.input}
        arrays = {t.name: array_of(t) for t in model.graph.initializer if t.name not in given}
        nodes = []
        for node in model.graph.node:
            if node.op_type == "Constant" and [a.name for a in node.attribute] == ["value"]:
                arrays[node.output[0]] = array_of(node.attribute[0].t)
                continue
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            nodes.append(copy)
        return Graph(model=model, nodes=nodes, arrays=arrays)

    @property
    def opset(self) -> int:
        return next((e.version for e in self.model.opset_import if e.domain in ("", "ai.onnx")), 0)

    def readers(self, name: str) -> list[onnx.NodeProto]:
        """The nodes that read a value, subgraphs included; the graph's own outputs are not told."""
        return [node for node in self.nodes if name in node.input or name in set(_captured(node))]

    def fresh_name(self, like: str) -> str:
        taken = {*self.arrays, *(name for node in self.nodes for name in (*node.input, *node.output))}
        taken |= {value.name for value in (*self.model.graph.input, *self.model.graph.initializer)}
        return next(name for n in range(len(taken) + 1) if (name := f"{like}_compact{n or ''}") not in taken)

    def shapes(self) -> dict[str, Shape]:
        """Shapes that can be told, free sizes replaced by `_FREE_SIZES`."""
        shadow = onnx.ModelProto(ir_version=self.model.ir_version)
        shadow.opset_import.extend(self.model.opset_import)
        shadow.functions.extend(self.model.functions)
        graph = shadow.graph
        graph.name = "shapes"
        graph.node.extend(self.nodes)
        graph.input.extend(self.model.graph.input)
        graph.output.extend(self.model.graph.output)
        for value in graph.output:
            value.type.tensor_type.ClearField("shape")
        free: dict[str, int] = {}
        for value in graph.input:
            for dim in value.type.tensor_type.shape.dim:
                if not dim.HasField("dim_value"):
                    key = dim.dim_param or f"unnamed {len(free)}"
                    dim.dim_value = free.setdefault(key, _FREE_SIZES[len(free) % len(_FREE_SIZES)])
        for name, array in self.arrays.items():
            if array.size <= _SMALL:
                graph.initializer.append(numpy_helper.from_array(array, name))
            else:  # only its shape matters, and large ones cost time
                kind = helper.np_dtype_to_tensor_dtype(array.dtype)
                graph.input.append(helper.make_tensor_value_info(name, kind, array.shape))
        shapes: dict[str, Shape] = {name: array.shape for name, array in self.arrays.items()}
        try:
            known = onnx.shape_inference.infer_shapes(shadow, data_prop=True).graph
        except (onnx.shape_inference.InferenceError, ValueError):  # somebody's graph
            return shapes
        for value in (*known.input, *known.value_info, *known.output):
            tensor = value.type.tensor_type
            if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
                shapes[value.name] = tuple(dim.dim_value for dim in tensor.shape.dim)
        return shapes

    def assembled(self) -> onnx.ModelProto:
        """The graph as a model with shapes, its constants in the old order, unused ones left out.

        Raises GateFailed when its sizes do not fit.
        """
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        read = {name for node in self.nodes for name in node.input}
        read |= {value.name for value in model.graph.output}
        read |= {name for name in self.arrays if self.readers(name)}
        overridable = {value.name for value in model.graph.input}
        same = {t.name: t for t in self.model.graph.initializer if t.name in overridable}
        tensors = [
            numpy_helper.from_array(array, name) for name, array in self.arrays.items() if name in read
        ]
        del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
        model.graph.node.extend(self.nodes)
        model.graph.initializer.extend([*same.values(), *tensors])
        try:
            model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
            onnx.checker.check_model(model, full_check=True)
        except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as cause:
            raise GateFailed(
                f"The rewritten graph is not valid: {str(cause).strip().partition(chr(10))[0]}",
                expected="Sizes that fit were expected.",
                do="Build the graph as it was exported, and report the network.",
            ) from cause
        return model


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """The value of an attribute of a node."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def title(node: onnx.NodeProto) -> str:
    """A node as messages call it."""
    return f"{node.op_type} {node.name or node.output[0]}"


def _captured(node: onnx.NodeProto) -> Iterator[str]:
    """Names that the subgraphs of a node read from outside, and perhaps names of their own."""
    for found in node.attribute:
        for graph in (*found.graphs, *([found.g] if found.HasField("g") else [])):
            yield from (value.name for value in graph.output)
            for inner in graph.node:
                yield from inner.input
                yield from _captured(inner)


def _padded(node: onnx.NodeProto) -> bool:
    auto = attribute(node, "auto_pad", b"NOTSET")
    return auto not in (b"NOTSET", b"VALID") or (auto == b"NOTSET" and any(attribute(node, "pads", ())))


@dataclass(kw_only=True)
class Channels:
    """The channels of a graph.

    values: by tensor name; a tensor that is not there has no channels that could be removed.  weights: by name
    and axis, the slots of an array's axis.  edges: slots that can only go together.  pins: slots that cannot
    go, with the reason.  layers: who sums over channels.
    """

    graph: Graph
    shapes: dict[str, Shape]
    n_slots: int = 0
    values: dict[str, Value] = field(default_factory=dict)
    weights: dict[tuple[str, int], Array] = field(default_factory=dict)
    edges: list[tuple[Array, Array]] = field(default_factory=list)
    pins: list[tuple[Array, str]] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    _claims: dict[str, set[tuple[int, ...]]] = field(default_factory=dict)
    _claimed_by: dict[str, set[str]] = field(default_factory=dict)

    @staticmethod
    def of(graph: Graph) -> Channels:
        """Walk the nodes in order. What a rule does not understand stays as it is."""
        channels = Channels(graph=graph, shapes=graph.shapes())
        for node in graph.nodes:
            channels._visit(node)
        for value in graph.model.graph.output:
            channels._pin_value(value.name, "it is an output of the graph")
            channels._claims.setdefault(value.name, set()).add(())
        for name, claims in channels._claims.items():
            if len(claims) > 1:
                for axis in {axis for claim in claims for axis in claim}:
                    channels.pin(channels.weights[name, axis], f"{name} is used in different ways")
        return channels

    # -- what rules say

    def fresh(self, n: int) -> Array:
        self.n_slots += n
        return np.arange(self.n_slots - n, self.n_slots)

    def tie(self, a: Array, b: Array) -> None:
        self.edges.append((a, b))

    def pin(self, slots: Array, reason: str) -> None:
        if len(slots):
            self.pins.append((slots, reason))

    def claim(self, node: onnx.NodeProto, name: str, ties: Mapping[int, Array]) -> None:
        """Say that removing slots removes the entries of an array along these axes."""
        self._claims.setdefault(name, set()).add(tuple(sorted(ties)))
        self._claimed_by.setdefault(node.output[0], set()).add(name)
        for axis, slots in ties.items():
            if (name, axis) not in self.weights:
                self.weights[name, axis] = self.fresh(self.graph.arrays[name].shape[axis])
            self.tie(self.weights[name, axis], slots)

    def set(self, name: str, axis: int, slots: Array, constant: Array | None = None) -> None:
        constant = np.full(len(slots), np.nan) if constant is None else constant
        self.values[name] = Value(axis=axis, slots=slots, constant=constant)

    def _pin_value(self, name: str, reason: str) -> None:
        if name in self.values:
            self.pin(self.values[name].slots, reason)

    def _visit(self, node: onnx.NodeProto) -> None:
        rule = _rule(node)
        understood = rule is not None and sum(map(bool, node.output)) >= 1 and rule(self, node)
        if not understood:
            for name in {*node.input, *_captured(node)}:
                self._pin_value(name, f"{title(node)} needs every channel of it")
            for name in node.output:
                self.values.pop(name, None)
        claimed = self._claimed_by.get(node.output[0], set()) if understood and node.output else set()
        for name in {*node.input, *_captured(node)} & self.graph.arrays.keys() - claimed:
            self._claims.setdefault(name, set()).add(())  # read as a whole

    def array(self, node: onnx.NodeProto, index: int) -> Array | None:
        """The constant that is an input of a node, None where it is absent or no constant."""
        name = node.input[index] if index < len(node.input) else ""
        return self.graph.arrays.get(name)

    def given(self, node: onnx.NodeProto, index: int) -> bool:
        return index < len(node.input) and bool(node.input[index])


Rule = Callable[[Channels, onnx.NodeProto], bool]


def _rule(node: onnx.NodeProto) -> Rule | None:
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type in _ONE_TO_ONE:
        return _one_to_one
    if node.op_type in _BROADCAST:
        return _broadcast
    if node.op_type in _REDUCE:
        return _reduce
    return _RULES.get(node.op_type)


def _bias(channels: Channels, node: onnx.NodeProto, n: int) -> Array | None:
    """The bias of a layer as (n,), None when it is no such constant."""
    if not channels.given(node, 2):
        return np.zeros(n)
    bias = channels.array(node, 2)
    if bias is None or bias.size not in (1, n) or math.prod(bias.shape[:-1]) != 1:
        return None
    return np.broadcast_to(bias.reshape(-1), (n,)).astype(np.float64)


def _sum_layer(
    channels: Channels,
    node: onnx.NodeProto,
    *,
    w_OIK: Array,
    in_axis: int,
    out_axis: int,
    input_axis: int,
    output_axis: int,
    bias: Array,
    scale: float = 1.0,
    same_everywhere: bool = True,
) -> bool:
    """A layer that sums over all channels of its input.

    w_OIK: (outputs, inputs, whatever is summed over besides).  same_everywhere: a constant input adds the same
    to every position of the output; else only a constant 0 does.
    """
    if w_OIK.dtype not in _REAL:
        return False
    weight = node.input[1]
    value = channels.values.get(node.input[0])
    n_out, n_in = w_OIK.shape[:2]
    reads_OI = (w_OIK != 0).any(axis=2)
    if value is not None and value.axis == input_axis and len(value.slots) == n_in:
        in_slots, constant = value.slots, value.constant
    else:
        channels._pin_value(node.input[0], f"{title(node)} reads it along another axis")
        in_slots, constant = channels.fresh(n_in), np.full(n_in, np.nan)
        channels.pin(in_slots, f"nothing before {title(node)} can lose channels")
    out_slots = channels.fresh(n_out)
    foldable = np.isfinite(constant) if same_everywhere else constant == 0
    channels.claim(node, weight, {in_axis: in_slots, out_axis: out_slots})
    stored = channels.array(node, 2)
    if stored is not None and stored.size == n_out and stored.ndim:
        channels.claim(node, node.input[2], {stored.ndim - 1: out_slots})
    layer = Layer(
        node=node,
        weight=weight,
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
    channels.layers.append(layer)
    with np.errstate(all="ignore"):
        rows = bias + layer.contribution(np.flatnonzero(foldable))
        rows[reads_OI[:, ~foldable].any(axis=1)] = np.nan
        rows = rows.astype(w_OIK.dtype).astype(np.float64)
    channels.set(node.output[0], output_axis, out_slots, rows)
    return True


def _conv(channels: Channels, node: onnx.NodeProto) -> bool:
    weight = channels.array(node, 1)
    if weight is None or weight.ndim < 3 or not weight.size:
        return False
    bias = _bias(channels, node, weight.shape[0])
    if bias is None:
        return False
    w_OIK = weight.reshape(*weight.shape[:2], -1)
    groups = attribute(node, "group", 1)
    if groups > 1:
        return _grouped_conv(channels, node, w_OIK, groups, bias)
    return _sum_layer(
        channels,
        node,
        w_OIK=w_OIK,
        in_axis=1,
        out_axis=0,
        input_axis=1,
        output_axis=1,
        bias=bias,
        same_everywhere=not _padded(node),
    )


def _grouped_conv(channels: Channels, node: onnx.NodeProto, w_OIK: Array, groups: int, bias: Array) -> bool:
    """Groups leave whole, inputs and outputs together: then the rest is a convolution of fewer groups."""
    n_out, n_in = w_OIK.shape[:2]
    value = channels.values.get(node.input[0])
    if value is None or value.axis != 1 or len(value.slots) != n_in * groups or w_OIK.dtype not in _REAL:
        return False
    out_slots = channels.fresh(n_out)
    group_of_input = np.repeat(np.arange(groups), n_in)
    group_of_output = np.repeat(np.arange(groups), n_out // groups)
    meeting = channels.fresh(groups)
    channels.tie(meeting[group_of_input], value.slots)
    channels.tie(meeting[group_of_output], out_slots)
    channels.claim(node, node.input[1], {0: out_slots})
    stored = channels.array(node, 2)
    if stored is not None and stored.size == n_out and stored.ndim == 1:
        channels.claim(node, node.input[2], {0: out_slots})
    reads_OI = (w_OIK != 0).any(axis=2)
    constant_OI = value.constant.reshape(groups, n_in)[group_of_output]
    usable_OI = (constant_OI == 0) if _padded(node) else np.isfinite(constant_OI)
    with np.errstate(all="ignore"):
        sums_OI = w_OIK.sum(axis=2, dtype=np.float64)
        rows = bias + (sums_OI * np.where(reads_OI & usable_OI, constant_OI, 0.0)).sum(axis=1)
        rows[(reads_OI & ~usable_OI).any(axis=1)] = np.nan
        rows = rows.astype(w_OIK.dtype).astype(np.float64)
    channels.set(node.output[0], 1, out_slots, rows)
    channels.layers.append(
        Layer(
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
    )
    return True


def _conv_transpose(channels: Channels, node: onnx.NodeProto) -> bool:
    weight = channels.array(node, 1)
    if weight is None or weight.ndim < 3 or not weight.size or attribute(node, "group", 1) != 1:
        return False
    bias = _bias(channels, node, weight.shape[1])
    if bias is None:
        return False
    w_OIK = weight.reshape(*weight.shape[:2], -1).swapaxes(0, 1)
    return _sum_layer(
        channels,
        node,
        w_OIK=w_OIK,
        in_axis=0,
        out_axis=1,
        input_axis=1,
        output_axis=1,
        bias=bias,
        same_everywhere=False,  # fewer kernel positions meet at the border
    )


def _gemm(channels: Channels, node: onnx.NodeProto) -> bool:
    weight = channels.array(node, 1)
    if weight is None or weight.ndim != 2 or not weight.size or attribute(node, "transA", 0):
        return False
    transposed = bool(attribute(node, "transB", 0))
    w_OI = weight if transposed else weight.T
    bias = _bias(channels, node, w_OI.shape[0])
    if bias is None:
        return False
    return _sum_layer(
        channels,
        node,
        w_OIK=w_OI[:, :, None],
        in_axis=1 if transposed else 0,
        out_axis=0 if transposed else 1,
        input_axis=1,
        output_axis=1,
        bias=attribute(node, "beta", 1.0) * bias,
        scale=attribute(node, "alpha", 1.0),
    )


def _matmul(channels: Channels, node: onnx.NodeProto) -> bool:
    weight, shape = channels.array(node, 1), channels.shapes.get(node.input[0])
    if weight is None or weight.ndim != 2 or not weight.size or shape is None or len(shape) < 2:
        return False
    return _sum_layer(
        channels,
        node,
        w_OIK=weight.T[:, :, None],
        in_axis=0,
        out_axis=1,
        input_axis=len(shape) - 1,
        output_axis=len(shape) - 1,
        bias=np.zeros(weight.shape[1]),
    )


def _evaluated(node: onnx.NodeProto, inputs: Sequence[Array | None], opset: int) -> Array | None:
    """What a node makes of small arrays, None when that cannot be had."""
    feeds = {name: x for name, x in zip(node.input, inputs, strict=True) if x is not None}
    try:
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
        with np.errstate(all="ignore"):
            found: Any = ReferenceEvaluator(one).run(None, feeds)
    except Exception:  # noqa: BLE001 - whatever it does not know; the channel counts as not constant then
        return None
    return np.asarray(found[0], dtype=np.float64)


def _one_to_one(channels: Channels, node: onnx.NodeProto) -> bool:
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


def _uniform(array: Array, axis: int) -> Array:
    """Per index of an axis the one number that all entries are, else NaN."""
    rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1).astype(np.float64)
    same: Array = np.where((rows == rows[:, :1]).all(axis=1), rows[:, 0], np.nan)
    return same


def _broadcast(channels: Channels, node: onnx.NodeProto) -> bool:
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
        elif array is not None and array.dtype in _REAL:
            if at >= 0 and size == n:
                channels.claim(node, name, {at: first.slots})
                columns.append(_uniform(array, at))
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


def _batch_norm(channels: Channels, node: onnx.NodeProto) -> bool:
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


def _pool(channels: Channels, node: onnx.NodeProto) -> bool:
    value = channels.values.get(node.input[0])
    if value is None:
        return True
    if value.axis != 1 or any(node.output[1:]):
        return False
    constant = value.constant
    if attribute(node, "ceil_mode", 0):  # a window may lie outside; what it then holds, runtimes disagree on
        constant = np.full_like(constant, np.nan)
    elif node.op_type == "AveragePool" and attribute(node, "count_include_pad", 0) and _padded(node):
        constant = np.where(constant == 0, 0.0, np.nan)
    channels.set(node.output[0], 1, value.slots, constant)
    return True


def _global_pool(channels: Channels, node: onnx.NodeProto) -> bool:
    value = channels.values.get(node.input[0])
    if value is None:
        return True
    if value.axis != 1:
        return False
    channels.set(node.output[0], 1, value.slots, value.constant)
    return True


def _axes(channels: Channels, node: onnx.NodeProto, index: int, rank: int) -> set[int] | None:
    if channels.given(node, index):
        found = channels.array(node, index)
        axes = None if found is None else [int(axis) for axis in found.reshape(-1)]
    else:
        axes = attribute(node, "axes", None)
    return None if not axes else {axis % rank for axis in axes}


def _reduce(channels: Channels, node: onnx.NodeProto) -> bool:
    value, shape = channels.values.get(node.input[0]), channels.shapes.get(node.input[0])
    if value is None:
        return True
    axes = None if shape is None else _axes(channels, node, 1, len(shape))
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


def _reshape(channels: Channels, node: onnx.NodeProto) -> bool:
    """Reshape, Flatten, Squeeze, Unsqueeze: of the axes that the channels may be found on, the one that keeps
    most of them apart.
    """
    value = channels.values.get(node.input[0])
    if value is None:
        return True
    before, after = channels.shapes.get(node.input[0]), channels.shapes.get(node.output[0])
    if before is None or after is None or 0 in before or math.prod(before) != math.prod(after):
        return False
    if node.op_type == "Reshape":
        sizes = channels.array(node, 1)
        if sizes is None or (attribute(node, "allowzero", 0) and not sizes.all()):
            return False
    if node.op_type == "Squeeze" and not _axes(channels, node, 1, len(before)):
        return False  # it would take away an axis on which one channel is left
    block = _block(before, after, value.axis)
    if block is None:
        return False
    first_in, ins, first_out, outs = block
    size = math.prod(ins)
    if not outs or size > _LARGEST_RESHAPE or any(n % free == 0 for n in ins for free in _FREE_SIZES):
        return False
    flat = np.arange(size)
    source = flat // math.prod(ins[value.axis - first_in + 1 :]) % len(value.slots)
    best: tuple[tuple[int, int], int, Array, Array] | None = None
    for place, n in enumerate(outs):
        target = flat // math.prod(outs[place + 1 :]) % n
        pairs = np.unique(source * n + target)
        from_slots, to_slots = pairs // n, pairs % n
        n_apart, _ = classes(len(value.slots) + n, [(from_slots, to_slots + len(value.slots))])
        if best is None or (n_apart, n) > best[0]:
            best = (n_apart, n), place, from_slots, to_slots
    assert best is not None
    _, place, from_slots, to_slots = best
    slots = channels.fresh(outs[place])
    channels.tie(value.slots[from_slots], slots[to_slots])
    low, high = np.full(len(slots), np.inf), np.full(len(slots), -np.inf)
    with np.errstate(invalid="ignore"):  # NaN, which says that a channel is not constant, wins
        np.minimum.at(low, to_slots, value.constant[from_slots])
        np.maximum.at(high, to_slots, value.constant[from_slots])
    channels.set(node.output[0], first_out + place, slots, np.where(low == high, low, np.nan))
    return True


def _block(before: Shape, after: Shape, axis: int) -> tuple[int, Shape, int, Shape] | None:
    """The smallest run of axes around `axis` that becomes a run of axes after: start and sizes of both."""
    i = o = 0
    while i < len(before):
        i0, o0, n_in, n_out = i, o, before[i], 1
        i += 1
        while n_in != n_out or (o == o0 and o < len(after)):
            if n_out < n_in or (o == o0 and o < len(after)):
                if o == len(after):
                    return None
                n_out *= after[o]
                o += 1
            else:
                if i == len(before):
                    return None
                n_in *= before[i]
                i += 1
        if i0 <= axis < i:
            return i0, before[i0:i], o0, after[o0:o]
    return None


def classes(n: int, edges: Sequence[tuple[Array, Array]]) -> tuple[int, Array]:
    """How many classes n slots fall into, and the class of each. edges: what is tied to what."""
    a = np.concatenate([pair[0] for pair in edges]) if edges else np.zeros(0, np.int64)
    b = np.concatenate([pair[1] for pair in edges]) if edges else np.zeros(0, np.int64)
    n_classes, labels = connected_components(
        coo_matrix((np.ones(len(a)), (a, b)), shape=(n, n)), directed=False
    )
    return int(n_classes), labels


def _transpose(channels: Channels, node: onnx.NodeProto) -> bool:
    value, shape = channels.values.get(node.input[0]), channels.shapes.get(node.input[0])
    if value is None:
        return True
    order = attribute(node, "perm", None)
    if order is None:
        if shape is None:
            return False
        order = list(range(len(shape)))[::-1]
    channels.set(node.output[0], list(order).index(value.axis), value.slots, value.constant)
    return True


def _concat(channels: Channels, node: onnx.NodeProto) -> bool:
    values = [channels.values.get(name) for name in node.input]
    shapes = [channels.shapes.get(name) for name in node.input]
    axes = {value.axis for value in values if value is not None}
    if not axes:
        return True
    if len(axes) > 1 or any(shape is None for shape in shapes):
        return False
    (axis,) = axes
    known = [shape for shape in shapes if shape is not None]
    along = attribute(node, "axis", 0) % len(known[0]) == axis
    slots, constants = [], []
    for name, value, shape in zip(node.input, values, known, strict=True):
        array = channels.graph.arrays.get(name)
        if value is not None:
            slots.append(value.slots)
            constants.append(value.constant)
            continue
        slots.append(channels.fresh(shape[axis]))
        if array is not None and array.dtype in _REAL and array.size:
            channels.claim(node, name, {axis: slots[-1]})
            constants.append(_uniform(array, axis))
        else:
            channels.pin(slots[-1], f"{title(node)} joins it with what cannot lose channels")
            constants.append(np.full(shape[axis], np.nan))
    if along:
        channels.set(node.output[0], axis, np.concatenate(slots), np.concatenate(constants))
        return True
    for other in slots[1:]:
        channels.tie(slots[0], other)
    same = np.where((np.array(constants) == constants[0]).all(axis=0), constants[0], np.nan)
    channels.set(node.output[0], axis, slots[0], same)
    return True


def _split(channels: Channels, node: onnx.NodeProto) -> bool:
    value, shape = channels.values.get(node.input[0]), channels.shapes.get(node.input[0])
    if value is None:
        return True
    if shape is None:
        return False
    if attribute(node, "axis", 0) % len(shape) != value.axis:
        for name in node.output:
            channels.set(name, value.axis, value.slots, value.constant)
        return True
    sizes = [channels.shapes.get(name, (0,) * len(shape))[value.axis] for name in node.output]
    by_attribute = attribute(node, "split", None) or channels.graph.opset < 13
    not_constant = channels.given(node, 1) and channels.array(node, 1) is None
    if by_attribute or not_constant or not all(sizes) or sum(sizes) != len(value.slots):
        return False
    ends = np.cumsum(sizes)
    for name, start, end in zip(node.output, ends - sizes, ends, strict=True):
        channels.set(name, value.axis, value.slots[start:end], value.constant[start:end])
    return True


def slice_range(channels: Channels, node: onnx.NodeProto, axis: int, size: int) -> tuple[int, int] | None:
    """Which part of an axis a Slice takes: (start, end); None when that is not a plain run."""
    starts, ends = channels.array(node, 1), channels.array(node, 2)
    if starts is None or ends is None:
        return None
    rank = len(channels.shapes[node.input[0]])
    if channels.given(node, 3):
        axes = channels.array(node, 3)
        if axes is None:
            return None
        places = [int(a) % rank for a in axes]
    else:
        places = list(range(len(starts)))
    steps = channels.array(node, 4) if channels.given(node, 4) else np.ones(len(places), np.int64)
    if steps is None:
        return None
    if axis not in places:
        return 0, size
    at = places.index(axis)
    if int(steps[at]) != 1:
        return None
    start, end, _ = slice(int(starts[at]), int(ends[at])).indices(size)
    return (start, end) if start < end else None


def _slice(channels: Channels, node: onnx.NodeProto) -> bool:
    value, shape = channels.values.get(node.input[0]), channels.shapes.get(node.input[0])
    if value is None:
        return True
    if shape is None or len(node.input) < 3:
        return False
    found = slice_range(channels, node, value.axis, len(value.slots))
    if found is None:
        return False
    start, end = found
    channels.set(node.output[0], value.axis, value.slots[start:end], value.constant[start:end])
    return True


def _gather(channels: Channels, node: onnx.NodeProto) -> bool:
    """Channels that are picked by constant numbers are channels of their own: fewer numbers, fewer channels."""
    shape, indices = channels.shapes.get(node.input[0]), channels.array(node, 1)
    if shape is None or indices is None or node.input[0] in channels.graph.arrays:
        return False
    value = channels.values.get(node.input[0])
    axis = attribute(node, "axis", 0) % len(shape)
    if value is not None and value.axis != axis:
        place = value.axis if value.axis < axis else value.axis - 1 + indices.ndim
        channels.set(node.output[0], place, value.slots, value.constant)
        return True
    if indices.ndim != 1 or not indices.size:
        return False
    slots = channels.fresh(len(indices))
    channels.claim(node, node.input[1], {0: slots})
    constant = None
    if value is not None:
        channels.pin(value.slots, f"{title(node)} picks from it by number")
        constant = value.constant[indices]
    channels.set(node.output[0], axis, slots, constant)
    return True


def _shape_of(channels: Channels, node: onnx.NodeProto) -> bool:
    value, shape = channels.values.get(node.input[0]), channels.shapes.get(node.input[0])
    if value is None:
        return True
    if shape is None:
        return False
    start, end, _ = slice(attribute(node, "start", 0), attribute(node, "end", None)).indices(len(shape))
    return not start <= value.axis < end


def _pad(channels: Channels, node: onnx.NodeProto) -> bool:
    value, shape = channels.values.get(node.input[0]), channels.shapes.get(node.input[0])
    if value is None:
        return True
    pads = channels.array(node, 1)
    if shape is None or pads is None or channels.given(node, 3) or pads.size != 2 * len(shape):
        return False
    if pads.reshape(2, -1)[:, value.axis].any():
        return False
    constant = value.constant
    if attribute(node, "mode", b"constant") == b"constant":
        if channels.given(node, 2):
            filler = channels.array(node, 2)
            number = np.nan if filler is None or not filler.size else float(filler.reshape(-1)[0])
        else:
            number = 0.0
        constant = np.where(constant == number, constant, np.nan)
    channels.set(node.output[0], value.axis, value.slots, constant)
    return True


def _resize(channels: Channels, node: onnx.NodeProto) -> bool:
    value = channels.values.get(node.input[0])
    if value is None:
        return True
    scales = channels.array(node, 2)
    if scales is None or channels.given(node, 3) or attribute(node, "axes", None):
        return False
    if value.axis >= scales.size or scales[value.axis] != 1:
        return False
    plain = attribute(node, "mode", b"nearest") == b"nearest"
    plain = plain and attribute(node, "coordinate_transformation_mode", b"") != b"tf_crop_and_resize"
    channels.set(node.output[0], value.axis, value.slots, value.constant if plain else None)
    return True


_RULES: dict[str, Rule] = {
    "AveragePool": _pool,
    "BatchNormalization": _batch_norm,
    "Concat": _concat,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Flatten": _reshape,
    "Gather": _gather,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "MatMul": _matmul,
    "MaxPool": _pool,
    "Pad": _pad,
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape_of,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _reshape,
    "Transpose": _transpose,
    "Unsqueeze": _reshape,
}
