"""What the layers of an ONNX graph are: shapes, zeros, multiply-accumulates, N:M and who can use it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import onnx

from sparse_export.errors import ArtefactError, GateFailed, UsageError
from sparse_export.formats.layers import GraphLayer, Reason
from sparse_export.formats.run import LayerInfo
from sparse_export.graph.collection import without_collection
from sparse_export.graph.concrete import free_sizes, inferred_at, shapes_at
from sparse_export.graph.constants import (
    Constant,
    Evaluator,
    Read,
    Scope,
    Step,
    Unevaluated,
    array_of,
    attribute,
    is_standard,
    node_name,
    scopes,
)
from sparse_export.graph.eligibility import (
    WeightUse,
    reason,
    reasons_if_pruned,
    reasons_of,
    verdict,
)
from sparse_export.graph.functions import inlined
from sparse_export.graph.if_pruned import LayerIfPruned
from sparse_export.graph.names import node_lists
from sparse_export.graph.shapes import without_weights
from sparse_export.graph.weight_counts import WeightCounts, count_groups_over, count_weight

if TYPE_CHECKING:  # it loads torch, which reading a graph does not need
    from sparse_export.sparsity.pattern import NMPattern

FLOATS = frozenset(
    (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
)
# Which operands can be the weight, the usual one first.
_OPERANDS = {"Conv": (1,), "ConvTranspose": (1,), "Gemm": (1, 0), "MatMul": (1, 0)}
_OTHER_LAYERS = frozenset(
    (
        *("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"),
        *("DeformConv", "Einsum", "LSTM", "GRU", "RNN"),
    )
)
_QUANTIZED = frozenset(
    (
        *("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "QGemm", "QAttention"),
        *(
            "MatMulNBits",
            "MatMulBnb4",
            "MatMulIntegerToFloat",
            "DynamicQuantizeMatMul",
            "DynamicQuantizeLSTM",
        ),
    )
)
# Operators that change neither values nor their order along an axis, or whose zeros are the stored ones.
LAYOUT = frozenset(("Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze"))
_PLAIN = LAYOUT | {"Cast", "CastLike", "QuantizeLinear", "DequantizeLinear"}
_UNPACK = ("sparse24", "Unpack24")
_SHARERS_NAMED = 3

Shape = tuple[int, ...]
_Layer = TypeVar("_Layer", bound=GraphLayer)


def layer_weight(
    node: onnx.NodeProto, initializers: Mapping[str, onnx.TensorProto]
) -> tuple[str, int] | None:
    """Name and reduction axis of the weight of a Conv, ConvTranspose, Gemm or MatMul, else None.

    The axis is that of the weight as it is stored. Only weights that are used as they are stored are found;
    `graph_layers` looks through the nodes between. Raises ArtefactError for an invalid node.
    """
    for position in _operands(node):
        name = node.input[position]
        if name in initializers:
            return name, _reduction_axis(node, position, len(initializers[name].dims))
    return None


def _operands(node: onnx.NodeProto) -> tuple[int, ...]:
    """Positions of the inputs that can be the weight of a layer; none for another node."""
    if node.op_type not in _OPERANDS or not is_standard(node):
        return ()
    if len(node.input) < 2 or not all(node.input[:2]) or not node.output:
        raise _wrong(node, f"has the inputs {list(node.input)}", "two inputs and an output")
    return _OPERANDS[node.op_type]


def _reduction_axis(node: onnx.NodeProto, position: int, rank: int) -> int:
    """The axis of a weight that is summed over.

    Conv (O, I/groups, ...): 1. ConvTranspose (I, O/groups, ...): 0. Gemm: 1 with transB, else 0; as the left
    operand 0 with transA, else 1. MatMul: the last but one of the right operand, the last of the left (ONNX
    operator definitions, opset 13).
    """
    expected = {"Conv": rank > 2, "ConvTranspose": rank > 2, "Gemm": rank == 2, "MatMul": rank > 0}
    if not expected[node.op_type]:
        raise _wrong(node, f"has a weight of {rank} axes", "a weight that such a node can take")
    if node.op_type == "Conv":
        return 1
    if node.op_type == "ConvTranspose":
        return 0
    if node.op_type == "MatMul":
        return rank - 1 if position == 0 else max(rank - 2, 0)
    turned = bool(attribute(node, "transB" if position else "transA", 0))
    return int(turned) if position else int(not turned)


def _wrong(node: onnx.NodeProto, found: str, expected: str) -> ArtefactError:
    return ArtefactError(
        f"The {node.op_type} {node_name(node)} {found}.",
        expected=f"{expected[0].upper()}{expected[1:]} was expected.",
        do="Export the model again.",
    )


@dataclass(frozen=True, kw_only=True)
class LayerUse:
    """A layer that multiplies by a known constant, with where it stands.

    where: path and name of the node.  position: of the operand that is the weight.  stored: name of what it
    is made of.  steps: the nodes between, from the layer up.  packed: is it the output of Unpack24, which is
    a way of storing and no work?
    """

    node: onnx.NodeProto
    scope: Scope
    where: str
    position: int
    weight: Constant
    stored: str
    steps: tuple[Step, ...]
    packed: bool

    @property
    def through(self) -> tuple[str, ...]:
        return (*(step.node.op_type for step in self.steps), *([_UNPACK[1]] if self.packed else []))

    @functools.cached_property
    def axis(self) -> int:
        return _reduction_axis(self.node, self.position, self.weight.values.ndim)

    @functools.cached_property
    def channel_groups(self) -> int:
        """Of a convolution, 1 for the rest. Raises ArtefactError when they do not divide the channels."""
        if self.node.op_type not in ("Conv", "ConvTranspose"):
            return 1
        groups = attribute(self.node, "group", 1)
        n_channels = self.weight.values.shape[0]  # the outputs of Conv, the inputs of ConvTranspose
        if groups < 1 or n_channels % groups:
            raise _wrong(
                self.node,
                f"has {groups} groups for {n_channels} channels",
                "a number of groups that divides the channels",
            )
        return groups

    @functools.cached_property
    def n_reduced(self) -> int:
        """Entries along the reduction axis that are summed together: those of one group of channels."""
        length: int = self.weight.values.shape[self.axis]
        return length // self.channel_groups if self.node.op_type == "ConvTranspose" else length

    @functools.cached_property
    def n_outputs(self) -> int:
        """Length of the other side of the product: the outputs of one group of channels."""
        shape = self.weight.values.shape
        if self.node.op_type == "Conv":
            return int(shape[0]) // self.channel_groups
        if self.node.op_type == "ConvTranspose":
            return int(shape[1])
        return int(math.prod(shape[-2:])) // max(int(shape[self.axis]), 1)


@dataclass(frozen=True, kw_only=True)
class OtherLayer:
    """A layer whose weight is not known, or not a constant.

    macs: 0 where no weight works, None when not known.
    """

    node: onnx.NodeProto
    scope: Scope
    where: str
    name: str
    why: tuple[Reason, ...]
    constant: bool = False
    macs: int | None = None


@without_collection()
def graph_layers(model: onnx.ModelProto) -> tuple[GraphLayer, ...]:
    """The layers of a graph, in graph order, with their pattern and whether hardware can use it.

    Every Conv, ConvTranspose, Gemm and MatMul, also in branches, loops and model-local functions, and the
    nodes with weights that are not looked into. A weight that two nodes share gives two layers.
    Multiply-accumulates are those of one sample: a free leading axis of an input counts as 1, a fixed one is
    divided out; None where shapes stay unknown. Nodes of one name are told apart: the second is `name#2`.
    Raises ArtefactError for an invalid graph.
    """
    plain = inlined(without_weights(model))
    shapes, n_samples = _shapes_of_one_sample(plain)
    graphs = list(scopes(model, plain.graph.node))
    layers = [_layer(use, shapes, n_samples) for use in _uses(model, plain, graphs, array_of)]
    return tuple(_with_shared(layers, graphs))


def layer_uses(model: onnx.ModelProto, *, read: Read = array_of) -> Iterator[LayerUse | OtherLayer]:
    """The layers of `graph_layers` with their nodes and the values of their weights, one after the other, so
    that one weight at a time need be in memory. Raises ArtefactError for an invalid graph.

    read: gives the values of what the model stores.
    """
    plain = inlined(without_weights(model))
    yield from _uses(model, plain, scopes(model, plain.graph.node), read)


@without_collection()
def layers_if_pruned(
    model: onnx.ModelProto, promised: Mapping[str, NMPattern] | None = None, *, read: Read = array_of
) -> tuple[tuple[LayerIfPruned, ...], tuple[str, ...]]:
    """As `graph_layers`, with what each layer would keep if it were made 2:4, and could do then.

    Each weight is read once, one after the other.

    Args:
        model: not changed.
        promised: patterns by name of the stored weight.
        read: gives the values of what the model stores.

    Returns:
        The layers, and a clause for each promise that is not kept, as `broken_patterns` gives them.

    Raises:
        ArtefactError: the graph is invalid.
    """
    plain = inlined(without_weights(model))
    shapes, n_samples = _shapes_of_one_sample(plain)
    graphs = list(scopes(model, plain.graph.node))
    layers = []
    found: dict[str, list[str]] = {}
    for use in _uses(model, plain, graphs, read):
        layers.append(_if_pruned(use, shapes, n_samples))
        _note_promise(use, promised or {}, found)
    return tuple(_with_shared(layers, graphs)), _not_kept(promised or {}, found)


def _uses(
    model: onnx.ModelProto, plain: onnx.ModelProto, graphs: Iterable[Scope], read: Read
) -> Iterator[LayerUse | OtherLayer]:
    """The layers one after the other, so that one weight at a time is in memory.

    plain: the model without its functions, as far as they could be inlined, and perhaps without its weights.
    graphs: those of the model, with the nodes of `plain`.
    """
    evaluator = Evaluator(model, read)
    functions = {(function.domain, function.name) for function in plain.functions}
    packed = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if (node.domain, node.op_type) == _UNPACK and node.input and node.output
    }
    for scope in graphs:
        for node, known_as in zip(scope.nodes, scope.names, strict=True):
            where = f"{scope.path}{known_as}"
            positions = _operands(node)
            position = next((i for i in positions if scope.is_constant(node.input[i])), None)
            if position is not None:
                yield _examined(node, scope, where, position, evaluator, packed)
            elif positions:
                yield _without_constant(node, scope, where)
            elif (name := _unknown_weight(node, scope, functions)) is not None:
                text = f"{_operator(node)} has weights, or may have, and is not looked into."
                why = [reason("not-looked-into", text)]
                if node.op_type in _QUANTIZED:
                    why.append(reason("quantized", f"{_operator(node)} multiplies by quantized weights."))
                yield OtherLayer(node=node, scope=scope, where=where, name=name, why=tuple(why))


def _examined(
    node: onnx.NodeProto,
    scope: Scope,
    where: str,
    position: int,
    evaluator: Evaluator,
    packed: Mapping[str, str],
) -> LayerUse | OtherLayer:
    name = node.input[position]
    weight = evaluator.evaluate(scope, name)
    if isinstance(weight, Unevaluated):
        why = reason("not-evaluated", f"The weight {name} {weight.why}.")
        return OtherLayer(node=node, scope=scope, where=where, name=name, why=(why,), constant=True)
    names = [name, *(step.source for step in weight.steps)]
    first = next((i for i, at in enumerate(names) if at in packed), None)
    return LayerUse(
        node=node,
        scope=scope,
        where=where,
        position=position,
        weight=weight,
        stored=weight.stored if first is None else packed[names[first]],
        steps=weight.steps[:first],
        packed=first is not None,
    )


def _without_constant(node: onnx.NodeProto, scope: Scope, where: str) -> OtherLayer:
    name = node.input[1]
    if node.op_type in ("Conv", "ConvTranspose"):
        why = reason("not-constant", f"The weight {name} depends on an input of the graph.")
    else:
        why = reason("activations")
    return OtherLayer(node=node, scope=scope, where=where, name=name, why=(why,), macs=0)


def _operator(node: onnx.NodeProto) -> str:
    return node.op_type if is_standard(node) else f"{node.domain}::{node.op_type}"


def _unknown_weight(node: onnx.NodeProto, scope: Scope, functions: set[tuple[str, str]]) -> str | None:
    """A constant matrix that a node gets which is no layer here but may be one."""
    is_call = (node.domain, node.op_type) in functions
    if is_standard(node) and node.op_type not in _OTHER_LAYERS and not is_call:
        return None
    for name in node.input:
        found = scope.find(name) if name else None
        if found is None:
            continue
        what = found[1]
        if scope.is_constant(name) if isinstance(what, onnx.NodeProto) else len(what.dims) > 1:
            return str(name)
    return "" if is_call else None


def _layer(use: LayerUse | OtherLayer, shapes: Mapping[str, Shape], n_samples: int) -> GraphLayer:
    if isinstance(use, OtherLayer):
        return GraphLayer(
            node=use.where,
            op_type=_operator(use.node),
            weight=use.name,
            shape=(),
            reduction_axis=0,
            n_weights=0,
            n_nonzero=0,
            macs=use.macs,
            nonzero_macs=use.macs,
            constant=use.constant,
            eligible=verdict(use.why),
            reasons=use.why,
        )
    values = use.weight.values
    counted = _counted(use)
    n_nonzero = counted.n_nonzero
    uses = None if use.scope.path else _uses_of_a_weight(use.node, values.shape, use.axis, shapes)
    uses = uses // n_samples if uses is not None and uses % n_samples == 0 else None
    facts = _facts(use)
    reasons = reasons_of(facts)
    return GraphLayer(
        node=use.where,
        op_type=use.node.op_type,
        weight=use.stored,
        shape=values.shape,
        reduction_axis=use.axis,
        n_weights=values.size,
        n_nonzero=n_nonzero,
        macs=None if uses is None else uses * values.size,
        nonzero_macs=None if uses is None else uses * n_nonzero,
        through=use.through,
        dtype=facts.dtype,
        stored_axis=None if use.packed else use.weight.stored_axis(use.axis),
        pattern_holds=counted.over is not None and not counted.over[0],
        n_groups=facts.n_groups,
        n_groups_over=facts.n_groups_over,
        obeys=counted.obeys,
        eligible=verdict(reasons),
        reasons=reasons,
    )


def _counted(use: LayerUse) -> WeightCounts:
    """Counted once for all the layers that share a weight."""
    key = "counted", use.axis, use.n_reduced
    if key not in use.weight.measured:
        use.weight.measured[key] = count_weight(use.weight.values, use.axis, use.n_reduced)
    found: WeightCounts = use.weight.measured[key]
    return found


def _if_pruned(use: LayerUse | OtherLayer, shapes: Mapping[str, Shape], n_samples: int) -> LayerIfPruned:
    layer = _layer(use, shapes, n_samples)
    if isinstance(use, OtherLayer):
        return LayerIfPruned(
            **vars(layer), eligible_if_pruned=layer.eligible, reasons_if_pruned=layer.reasons
        )
    counted = _counted(use)
    reasons = reasons_if_pruned(_facts(use), finite=counted.is_finite or not counted.has_sums)
    return LayerIfPruned(
        **vars(layer),
        would_keep=counted.share_kept if counted.is_finite else None,
        magnitude=counted.kept + counted.dropped if counted.is_finite else None,
        eligible_if_pruned=verdict(reasons),
        reasons_if_pruned=reasons,
    )


def _facts(use: LayerUse) -> WeightUse:
    """What is known of a layer, worked out once for all that use one weight alike."""
    quantized = _quantized_type(use)
    alike = use.node.op_type, use.axis, use.channel_groups, use.position, bool(use.scope.path), quantized
    key = "facts", alike, use.packed
    if key not in use.weight.measured:
        use.weight.measured[key] = _facts_alone(use, quantized)
    found: WeightUse = use.weight.measured[key]
    return found


def _facts_alone(use: LayerUse, quantized: str | None) -> WeightUse:
    shape = use.weight.values.shape
    over = _counted(use).over
    masks = [
        f"{step.node.op_type} with the mask {step.masked_by}"
        for step in use.steps
        if step.masked_by is not None
    ]
    work = [
        step.node.op_type for step in use.steps if step.node.op_type not in _PLAIN and step.masked_by is None
    ]
    return WeightUse(
        op_type=use.node.op_type,
        shape=shape,
        dtype=quantized or use.weight.values.dtype.name,
        n_reduced=use.n_reduced,
        n_outputs=use.n_outputs,
        channel_groups=use.channel_groups,
        n_groups=None if over is None else over[1],
        n_groups_over=None if over is None else over[0],
        on_left=use.position == 0,
        n_matrices=math.prod(shape[:-2]) if use.node.op_type == "MatMul" else 1,
        stored_as=next((step.dtype for step in use.steps if step.node.op_type == "DequantizeLinear"), None),
        weight_only=quantized is None and any(step.node.op_type == "DequantizeLinear" for step in use.steps),
        zero_point=any(step.zero_point for step in use.steps),
        masked_by=masks[0] if masks else None,
        computed_by=tuple(dict.fromkeys(work)),
        sparse_initializer=use.weight.sparse,
        overridable=use.weight.overridable,
        in_subgraph=bool(use.scope.path),
    )


def _quantized_type(use: LayerUse) -> str | None:
    """The type that both sides are quantized to; None when one of them is not, or other work comes
    between.
    """
    work = [step for step in use.steps if step.node.op_type not in LAYOUT]
    other = use.node.input[0 if use.position else 1]
    if work and work[0].node.op_type == "DequantizeLinear" and _is_dequantized(use.scope, other):
        return work[0].dtype
    return None


def _is_dequantized(scope: Scope, name: str) -> bool:
    """Does a value come out of a DequantizeLinear, but for a change of layout?"""
    for _ in range(16):  # a wrong graph could send us in a circle
        found = scope.find(name)
        if found is None or not isinstance(found[1], onnx.NodeProto):
            return False
        scope, node = found
        if node.op_type == "DequantizeLinear":
            return True
        if node.op_type not in LAYOUT or not node.input:
            return False
        name = node.input[0]
    return False


def _with_shared(layers: Sequence[_Layer], graphs: Iterable[Scope]) -> Iterator[_Layer]:
    """Add to each layer who else uses what is stored for it: other layers, and nodes that get it as
    stored.
    """
    users: dict[str, dict[str, None]] = {layer.weight: {} for layer in layers if layer.shape}
    for layer in layers:
        users.get(layer.weight, {})[layer.node] = None
    for scope in graphs:
        for node, known_as in zip(scope.nodes, scope.names, strict=True):
            if not scope.constant.issuperset(node.output):  # else it is on the way of a weight
                for name in users.keys() & set(node.input):
                    users[name][f"{scope.path}{known_as}"] = None
    for layer in layers:
        few = itertools.islice(users.get(layer.weight, ()), _SHARERS_NAMED + 1)
        others = [node for node in few if node != layer.node][:_SHARERS_NAMED]
        if others:
            shared = reason("shared", f"{layer.weight} is used by {', '.join(others)} too.")
            reasons = (*layer.reasons, shared)
            if isinstance(layer, LayerIfPruned):
                pruned = (*layer.reasons_if_pruned, shared)
                layer = replace(layer, reasons=reasons, reasons_if_pruned=pruned)
            else:
                layer = replace(layer, reasons=reasons)
        yield layer


def require_patterns(model: onnx.ModelProto, promised: Mapping[str, NMPattern]) -> None:
    """Hold a graph to the patterns that were promised, by name of the stored weight.

    Raises GateFailed that names the first weights that break theirs, are not in the graph, or cannot be
    checked; ArtefactError for an invalid graph.
    """
    broken = broken_patterns(model, promised)
    if broken:
        more = f"; and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise GateFailed(
            f"{len(broken)} of {len(promised)} weights do not keep their pattern in the graph: "
            f"{'; '.join(broken[:5])}{more}.",
            expected="At most N nonzeros in every M along the reduction axis were promised.",
            do="Run `sparse-export inspect` on the graph to see every layer.",
        )


@without_collection()
def broken_patterns(model: onnx.ModelProto, promised: Mapping[str, NMPattern]) -> tuple[str, ...]:
    """A clause for each promise that a graph does not keep, in the order of the promises.

    See `require_patterns`.
    """
    if not promised:
        return ()
    found: dict[str, list[str]] = {}
    for use in layer_uses(model):
        _note_promise(use, promised, found)
    return _not_kept(promised, found)


def _note_promise(
    use: LayerUse | OtherLayer, promised: Mapping[str, NMPattern], found: dict[str, list[str]]
) -> None:
    """Note under the name of a weight how a layer breaks its promise, or "" where it keeps it."""
    name = use.stored if isinstance(use, LayerUse) else use.name
    if name in promised:
        why = _broken(use, promised[name]) if isinstance(use, LayerUse) else "its values are not known"
        found.setdefault(name, []).append(f"{why}, in {use.where}" if why else "")


def _not_kept(promised: Mapping[str, NMPattern], found: Mapping[str, list[str]]) -> tuple[str, ...]:
    clauses = []
    for name, pattern in promised.items():
        whys = found.get(name, ["it is not the weight of a layer there"])
        why = next(filter(None, whys), "")
        if why:
            clauses.append(f"{name}, promised {pattern}: {why}")
    return tuple(clauses)


def _broken(use: LayerUse, pattern: NMPattern) -> str:
    if _counted(use).most.get(pattern.m, pattern.m) <= pattern.n < pattern.m:
        return ""
    over = count_groups_over(use.weight.values, use.axis, use.n_reduced, n=pattern.n, m=pattern.m)
    if over is None:
        return f"{pattern.m} does not divide the {use.n_reduced} entries along its reduction axis"
    return f"{over[0]:,} of {over[1]:,} groups have more than {pattern.n} nonzeros" if over[0] else ""


def promised_patterns(layers: Iterable[LayerInfo]) -> dict[str, NMPattern]:
    """The patterns that layers promise, by name. Raises ArtefactError for text that is no pattern."""
    promised = {layer.name: layer.pattern for layer in layers if layer.pattern is not None}
    if not promised:
        return {}
    from sparse_export.sparsity.pattern import pattern_from_text

    try:
        return {name: pattern_from_text(text) for name, text in promised.items()}
    except UsageError as cause:
        raise ArtefactError(f"The promised pattern of a layer is invalid. {cause}") from cause


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
    """Known shapes with free leading axes of the inputs set to 1, and the leading axis where it is fixed.

    model: without its weights. What follows from shapes is computed only where a layer's shape is missing
    otherwise, since that takes longer. Shapes are not asked for of layers inside branches and loops.
    """
    makers = [node for node in model.graph.node if node.op_type in _OPERANDS and node.output]
    if not makers:
        return {}, 1
    one = onnx.ModelProto()
    one.CopyFrom(model)
    del one.functions[:]  # inference would go into every call, of calls, of calls
    for nodes in node_lists(one):
        for node in nodes:
            node.domain = "" if is_standard(node) else node.domain
    leading = [name for name, places in free_sizes(one).items() if any(axis == 0 for _, axis in places)]
    sizes = dict.fromkeys(leading, 1)
    shapes = inferred_at(one, sizes)
    if any(None in shapes.get(node.output[0], (None,)) for node in makers):
        shapes = shapes_at(one, sizes)
    initializers = {tensor.name for tensor in one.graph.initializer}
    first = next((value for value in one.graph.input if value.name not in initializers), None)
    known = None if first is None else shapes.get(first.name)
    n_samples = known[0] if known and known[0] is not None else 1
    found = {name: shape for name, shape in shapes.items() if None not in shape}
    return found, max(n_samples, 1)  # type: ignore[return-value]  # no None is left


def n_parameters(model: onnx.ModelProto) -> int:
    """Count the entries of all float initializers."""
    return sum(math.prod(tensor.dims) for tensor in _float_initializers(model))


def count_parameters(model: onnx.ModelProto) -> tuple[int, int]:
    """Entries of all float initializers, and how many of them are not zero."""
    n_nonzero = sum(int(np.count_nonzero(array_of(tensor))) for tensor in _float_initializers(model))
    return n_parameters(model), n_nonzero


def _float_initializers(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    return [tensor for tensor in model.graph.initializer if tensor.data_type in FLOATS]
