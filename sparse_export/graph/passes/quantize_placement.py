"""Decides where QuantizeLinear and DequantizeLinear stand so that products read and write quantized values.

TensorRT picks a sparse int8 kernel only for a product that reads int8 and writes int8 (NVIDIA/TensorRT issue
4694, Model-Optimizer pull request 1664). What a product writes is the end of what is fused with it: bias,
activation, and the residual that is added, whose other side is then quantized too. Where Softmax, a
normalization or GELU follows, and where a residual goes into a normalization, the pair stands directly behind
product and bias. What moves values only, like MaxPool, Reshape and Concat, has one scale on both sides, so that a
second pair there changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx
from onnx import TensorProto

from sparse_export.graph.names import inner_graphs
from sparse_export.graph.nodes import attribute, is_standard

__all__ = ["PRODUCTS", "Placement", "Product", "output_axis", "place_pairs"]

PRODUCTS = ("Conv", "Gemm", "MatMul")
_ACTIVATIONS = frozenset(
    ("Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "Elu", "PRelu")
)
_GATES = frozenset(("Sigmoid", "HardSigmoid"))  # of x * sigmoid(x)
_WITH_CONSTANT = frozenset(("Add", "Sub", "Mul", "Div"))
# One value goes in by position 0, and each value that comes out is one of it.
_MOVING = frozenset(
    (
        *("MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity"),
        *("Slice", "Split", "DepthToSpace", "SpaceToDepth", "Dropout"),
    )
)
# What may read the sum of a residual for that sum to be quantized.
_READ_QUANTIZED = _MOVING | frozenset(
    (*PRODUCTS, "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "Concat", "Add", "Mul")
)
_SIZES = frozenset(("Shape", "Size"))  # they read no values
Use = tuple[int, int]
"""Index of a node, and position of its input."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """A Conv, Gemm or MatMul with a stored weight.

    Attributes:
        index: of the node.
        weight: name of the tensor.
        source: the value that it reads.
        end: the value that its kernel writes: what it makes itself, or the last of what is fused with it.
        is_quantized: is `end` quantized? Outputs of the graph are not: their steps would be ties.
    """

    index: int
    weight: str
    source: str
    end: str
    is_quantized: bool


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where pairs stand.

    Attributes:
        products: those that are quantized, by node.
        uses: by value, the inputs of nodes that read it through its pair.
        classes: by value, the name of those that share its scale.
    """

    products: tuple[Product, ...]
    uses: Mapping[str, frozenset[Use]]
    classes: Mapping[str, str]


@dataclass
class _Graph:
    """Who makes and who reads each value of a graph."""

    nodes: Sequence[onnx.NodeProto]
    constants: set[str]
    outputs: set[str]
    inside: set[str]
    makers: dict[str, int] = field(default_factory=dict)
    readers: dict[str, list[Use]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for index, node in enumerate(self.nodes):
            for at, name in enumerate(node.input if node.op_type not in _SIZES else ()):
                self.readers.setdefault(name, []).append((index, at))
            for name in node.output:
                self.makers[name] = index

    def users(self, value: str) -> list[onnx.NodeProto]:
        """The nodes that read a value, each once."""
        return [
            self.nodes[index] for index in dict.fromkeys(index for index, _ in self.readers.get(value, ()))
        ]

    def other(self, node: onnx.NodeProto, value: str) -> str | None:
        """The other operand of a node of two."""
        found = [name for name in node.input if name != value]
        return found[0] if len(node.input) == 2 and len(found) == 1 else None


def place_pairs(graph: onnx.GraphProto) -> Placement:
    """Decide where pairs stand in a graph of float32.

    Args:
        graph: whose weights are initializers. Values that graphs inside it read are left as they are.

    Returns:
        The placement; without products where there is nothing to quantize.
    """
    constants = _constants(graph)
    inside = {name for one in inner_graphs(graph.node) for node in one.node for name in node.input}
    inside |= {value.name for one in inner_graphs(graph.node) for value in one.output}
    wiring = _Graph(graph.node, constants, {value.name for value in graph.output}, inside)
    uses: dict[str, set[Use]] = {}
    products: list[Product] = []
    fused: set[int] = set()
    stored = {tensor.name: tensor for tensor in graph.initializer}
    found = [(index, node) for index, node in enumerate(graph.node) if _is_product(node, stored, constants)]
    # The largest first: of two that end in one sum, that one is fused with it.
    for index, node in sorted(found, key=lambda one: -_n_values(stored[one[1].input[1]])):
        uses.setdefault(node.input[0], set()).add((index, 0))
        end = _end(wiring, node.output[0], fused, uses)
        is_quantized = end not in wiring.outputs and end not in inside
        if is_quantized:
            uses.setdefault(end, set()).update(wiring.readers.get(end, ()))
        products.append(
            Product(
                index=index,
                weight=node.input[1],
                source=node.input[0],
                end=end,
                is_quantized=is_quantized,
            )
        )
    _add_concats(wiring, uses)
    return Placement(
        products=tuple(sorted(products, key=lambda one: one.index)),
        uses={value: frozenset(found) for value, found in uses.items()},
        classes=_classes(wiring, uses),
    )


def _constants(graph: onnx.GraphProto) -> set[str]:
    """Values that depend on no input of the graph."""
    found = {tensor.name for tensor in graph.initializer} | {""}
    for node in graph.node:
        has_inner = any(a.graphs or a.HasField("g") for a in node.attribute)
        if not has_inner and not node.op_type.startswith("Random") and found.issuperset(node.input):
            found.update(node.output)
    return found


def _is_product(node: onnx.NodeProto, stored: Mapping[str, TensorProto], constants: Collection[str]) -> bool:
    if node.op_type not in PRODUCTS or not is_standard(node) or len(node.input) < 2:
        return False
    weight = stored.get(node.input[1])
    if weight is None or weight.data_type != TensorProto.FLOAT or node.input[0] in constants:
        return False
    if node.op_type == "Gemm":
        return not attribute(node, "transA", 0)
    return node.op_type == "Conv" or len(weight.dims) == 2


def output_axis(node: onnx.NodeProto) -> int:
    """The axis of a product's weight that its output channels lie along.

    Args:
        node: a Conv, Gemm or MatMul with a weight of two axes.
    """
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return 0 if node.op_type == "Conv" else 1


def _n_values(tensor: TensorProto) -> int:
    total = 1
    for size in tensor.dims:
        total *= size
    return total


def _end(wiring: _Graph, value: str, fused: set[int], uses: dict[str, set[Use]]) -> str:
    """The last value that is computed together with a product; sums of residuals are noted as fused."""
    while value not in wiring.outputs and value not in wiring.inside:
        gated = _gated(wiring, value)
        users = wiring.users(value)
        if gated is None and len(users) != 1:
            break
        node = users[0]
        if gated is not None:
            following = gated
        elif _is_pointwise(wiring, node, value):
            following = node.output[0]
        elif _is_residual(wiring, node, value, fused):
            other = wiring.other(node, value)
            assert other is not None
            index = wiring.makers[node.output[0]]
            fused.add(index)
            uses.setdefault(other, set()).add((index, list(node.input).index(other)))
            following = node.output[0]
        else:
            break
        if following in wiring.outputs and not _is_alone(wiring, node, value):
            break
        value = following
    return value


def _is_alone(wiring: _Graph, node: onnx.NodeProto, value: str) -> bool:
    """Is it a bias, without which the value means nothing to a reader?"""
    other = wiring.other(node, value)
    return node.op_type == "Add" and other in wiring.constants


def _is_pointwise(wiring: _Graph, node: onnx.NodeProto, value: str) -> bool:
    if not is_standard(node):
        return False
    if node.op_type in _ACTIVATIONS or node.op_type == "BatchNormalization":
        return node.input[0] == value and wiring.constants >= set(node.input[1:])
    if node.op_type in _WITH_CONSTANT:
        return wiring.other(node, value) in wiring.constants
    return False


def _gated(wiring: _Graph, value: str) -> str | None:
    """The product of a value and its own sigmoid, where nothing else reads the two; None for another."""
    users = wiring.users(value)
    gates = [node for node in users if node.op_type in _GATES]
    if len(users) != 2 or len(gates) != 1:
        return None
    gate, scaled = gates[0].output[0], next(node for node in users if node is not gates[0])
    if scaled.op_type != "Mul" or wiring.other(scaled, value) != gate or gate in wiring.outputs:
        return None
    return scaled.output[0] if wiring.users(gate) == [scaled] else None


def _is_residual(wiring: _Graph, node: onnx.NodeProto, value: str, fused: Collection[int]) -> bool:
    """Is it a sum that nothing but products, pools and sums read, and that no other product is fused with?"""
    other = wiring.other(node, value)
    if node.op_type != "Add" or other is None or other in wiring.constants:
        return False
    result = node.output[0]
    if wiring.makers[result] in fused:
        return False
    users = wiring.users(result)
    if len(users) == 1 and users[0].op_type in _ACTIVATIONS:
        result = users[0].output[0]
    if result in wiring.outputs or result in wiring.inside:
        return False
    return all(_reads_quantized(wiring, user, result) for user in wiring.users(result))


def _reads_quantized(wiring: _Graph, node: onnx.NodeProto, value: str) -> bool:
    if node.op_type == "Mul":
        return wiring.other(node, value) is not None  # not its square
    return node.op_type in _READ_QUANTIZED


def _add_concats(wiring: _Graph, uses: dict[str, set[Use]]) -> None:
    """Quantize what goes into a Concat whose output is quantized, where all of it already was, in place."""
    for index, node in enumerate(wiring.nodes):
        if node.op_type != "Concat" or node.output[0] not in uses:
            continue
        if all(_is_carried(wiring, name, uses) for name in node.input):
            for at, name in enumerate(node.input):
                uses.setdefault(name, set()).add((index, at))


def _is_carried(wiring: _Graph, value: str, uses: Mapping[str, Collection[Use]]) -> bool:
    """Is a value quantized, or moved from one that is?"""
    while value not in uses:
        maker = wiring.makers.get(value)
        if maker is None or wiring.nodes[maker].op_type not in _MOVING:
            return False
        value = wiring.nodes[maker].input[0]
    return True


def _classes(wiring: _Graph, uses: Mapping[str, Collection[Use]]) -> dict[str, str]:
    """By value, the first of those that share its scale: what is only moved keeps it."""
    parents = {value: value for value in uses}

    def root(value: str) -> str:
        while parents[value] != value:
            parents[value] = parents[parents[value]]
            value = parents[value]
        return value

    def join(values: Iterable[str]) -> None:
        first, *rest = [root(value) for value in values]
        for one in rest:
            parents[root(one)] = root(first)

    for value in uses:
        source = value
        while (maker := wiring.makers.get(source)) is not None:
            node = wiring.nodes[maker]
            if node.op_type == "Concat":
                if uses.keys() >= set(node.input):
                    join((value, *node.input))
                break
            if node.op_type not in _MOVING:
                break
            source = node.input[0]
            if source in uses:
                join((value, source))
                break
    return {value: root(value) for value in uses}
