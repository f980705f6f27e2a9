"""What the layers of an ONNX graph are: shapes, zeros, multiply-accumulates, N:M and who can use it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import onnx

from sparse_export.formats.layers import GraphLayer
from sparse_export.graph.collection import without_collection
from sparse_export.graph.concrete import free_sizes, inferred_at, shapes_at
from sparse_export.graph.eligibility import (
    WeightUse,
    reason,
    reasons_if_pruned,
    reasons_of,
    verdict,
)
from sparse_export.graph.functions import inlined
from sparse_export.graph.if_pruned import LayerIfPruned
from sparse_export.graph.layer_uses import (
    LAYOUT,
    OPERANDS,
    LayerUse,
    OtherLayer,
    counted_of,
    operator_name,
    uses_within,
)
from sparse_export.graph.names import node_lists
from sparse_export.graph.nodes import is_standard
from sparse_export.graph.promises import not_kept, note_promise
from sparse_export.graph.scopes import Scope, scopes
from sparse_export.graph.shapes import without_weights
from sparse_export.graph.stored_tensors import Read, array_of

if TYPE_CHECKING:  # it loads torch, which reading a graph does not need
    from sparse_export.sparsity.pattern import NMPattern

FLOATS = frozenset(
    (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
)
_PLAIN = LAYOUT | {"Cast", "CastLike", "QuantizeLinear", "DequantizeLinear"}
_SHARERS_NAMED = 3

Shape = tuple[int, ...]
_Layer = TypeVar("_Layer", bound=GraphLayer)


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
    layers = [_layer(use, shapes, n_samples) for use in uses_within(model, plain, graphs, array_of)]
    return tuple(_with_shared(layers, graphs))


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
    for use in uses_within(model, plain, graphs, read):
        layers.append(_if_pruned(use, shapes, n_samples))
        note_promise(use, promised or {}, found)
    return tuple(_with_shared(layers, graphs)), not_kept(promised or {}, found)


def _layer(use: LayerUse | OtherLayer, shapes: Mapping[str, Shape], n_samples: int) -> GraphLayer:
    if isinstance(use, OtherLayer):
        return GraphLayer(
            node=use.where,
            op_type=operator_name(use.node),
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
    counted = counted_of(use)
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


def _if_pruned(use: LayerUse | OtherLayer, shapes: Mapping[str, Shape], n_samples: int) -> LayerIfPruned:
    layer = _layer(use, shapes, n_samples)
    if isinstance(use, OtherLayer):
        return LayerIfPruned(
            **vars(layer), eligible_if_pruned=layer.eligible, reasons_if_pruned=layer.reasons
        )
    counted = counted_of(use)
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
    over = counted_of(use).over
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
    makers = [node for node in model.graph.node if node.op_type in OPERANDS and node.output]
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
