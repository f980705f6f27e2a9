"""Whether each layer of a graph reads and writes quantized values, and which value breaks it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx

from sparse_export.graph.nodes import is_standard, node_name

__all__ = ["QuantizedEnds", "quantized_ends"]

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_MOST_STEPS = 12
# What moves values only, so that a DequantizeLinear before it is one behind it.
_MOVES = frozenset(
    (
        *("Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split"),
        *("MaxPool", "DepthToSpace", "SpaceToDepth"),
    )
)
# What may stand between a layer and the QuantizeLinear of what it puts out, so that one kernel computes all.
_FUSED_AFTER = frozenset(
    (
        *("Add", "Sub", "Mul", "Div", "Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "Elu", "PRelu"),
        *("HardSwish", "HardSigmoid", "Gelu"),
        *("Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "BatchNormalization"),
    )
)
_SIZES = ("Shape", "Size")


@dataclass(frozen=True, kw_only=True)
class QuantizedEnds:
    """What a layer reads and writes.

    Attributes:
        node: of the graph.
        reads: does it read quantized values, by input and by weight?
        writes: is all that it writes quantized, what is fused with it looked through?
        broken_by: the value that is not; the first of the inputs, else of the outputs. Empty where both hold.
    """

    node: str
    reads: bool
    writes: bool
    broken_by: str

    @property
    def holds(self) -> bool:
        """Does it read and write quantized values?"""
        return self.reads and self.writes


def quantized_ends(model: onnx.ModelProto) -> tuple[QuantizedEnds, ...]:
    """Look at what surrounds the layers of a graph, in its order; its weights are not looked at.

    Args:
        model: with or without QuantizeLinear nodes.
    """
    return tuple(_ends(model.graph))


def _ends(graph: onnx.GraphProto) -> Iterator[QuantizedEnds]:
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            if node.op_type not in _SIZES:
                readers.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}
    for node in graph.node:
        if node.op_type not in _LAYERS or not is_standard(node) or not node.output or len(node.input) < 2:
            continue
        unread = [name for name in node.input[:2] if not _is_dequantized(name, makers)]
        unwritten = _not_quantized(node.output[0], readers, outputs, _MOST_STEPS)
        yield QuantizedEnds(
            node=node_name(node),
            reads=not unread,
            writes=unwritten is None,
            broken_by=unread[0] if unread else unwritten or "",
        )


def _is_dequantized(name: str, makers: Mapping[str, onnx.NodeProto]) -> bool:
    for _ in range(_MOST_STEPS):
        node = makers.get(name)
        if node is None:
            return False
        if node.op_type == "DequantizeLinear":
            return True
        if node.op_type not in _MOVES or not node.input:
            return False
        name = node.input[0]
    return False


def _not_quantized(
    name: str, readers: Mapping[str, Sequence[onnx.NodeProto]], outputs: set[str], steps: int
) -> str | None:
    """The first value on the way out that something else than a fused node or a QuantizeLinear reads."""
    after = readers.get(name, [])
    if not after or name in outputs or not steps:
        return name
    for node in after:
        if node.op_type == "QuantizeLinear":
            continue
        if node.op_type not in _FUSED_AFTER or not node.output:
            return name
        found = _not_quantized(node.output[0], readers, outputs, steps - 1)
        if found is not None:
            return found
    return None
