"""Which nodes of an ONNX graph are layers, and the weight that each multiplies by."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import onnx

from sparse_export.errors import ArtefactError
from sparse_export.formats.layers import Reason
from sparse_export.graph.constants import Constant, Evaluator, Unevaluated
from sparse_export.graph.eligibility import reason
from sparse_export.graph.functions import inlined
from sparse_export.graph.nodes import attribute, is_standard, node_name
from sparse_export.graph.scopes import Scope, scopes
from sparse_export.graph.shapes import without_weights
from sparse_export.graph.stored_tensors import Read, array_of
from sparse_export.graph.weight_counts import WeightCounts, count_weight
from sparse_export.graph.weight_steps import Step

__all__ = [
    "LAYOUT",
    "OPERANDS",
    "LayerUse",
    "OtherLayer",
    "counted_of",
    "layer_uses",
    "layer_weight",
    "operator_name",
    "uses_within",
]

# Which operands can be the weight, the usual one first.
OPERANDS = {"Conv": (1,), "ConvTranspose": (1,), "Gemm": (1, 0), "MatMul": (1, 0)}
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
_UNPACK = ("sparse24", "Unpack24")


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
    if node.op_type not in OPERANDS or not is_standard(node):
        return ()
    if len(node.input) < 2 or not all(node.input[:2]) or not node.output:
        raise _wrong(node, f"has the inputs {list(node.input)}", "two inputs and an output")
    return OPERANDS[node.op_type]


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


def layer_uses(model: onnx.ModelProto, *, read: Read = array_of) -> Iterator[LayerUse | OtherLayer]:
    """The layers of `graph_layers` with their nodes and the values of their weights, one after the other, so
    that one weight at a time need be in memory. Raises ArtefactError for an invalid graph.

    read: gives the values of what the model stores.
    """
    plain = inlined(without_weights(model))
    yield from uses_within(model, plain, scopes(model, plain.graph.node), read)


def uses_within(
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
                text = f"{operator_name(node)} has weights, or may have, and is not looked into."
                why = [reason("not-looked-into", text)]
                if node.op_type in _QUANTIZED:
                    why.append(reason("quantized", f"{operator_name(node)} multiplies by quantized weights."))
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


def operator_name(node: onnx.NodeProto) -> str:
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


def counted_of(use: LayerUse) -> WeightCounts:
    """Counted once for all the layers that share a weight."""
    key = "counted", use.axis, use.n_reduced
    if key not in use.weight.measured:
        use.weight.measured[key] = count_weight(use.weight.values, use.axis, use.n_reduced)
    found: WeightCounts = use.weight.measured[key]
    return found
