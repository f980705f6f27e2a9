"""Which weights of an ONNX graph can be packed, and why not the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from sparse_export.graph.layer_uses import layer_weight
from sparse_export.graph.names import graphs_of
from sparse_export.graph.nodes import ONNX_DOMAINS
from sparse_export.graph.passes.weight24 import (
    BITS,
    Shape,
    bits_of,
    groups_of,
    groups_over,
    has_groups,
    nonzero_mask,
    type_name,
)


@dataclass(frozen=True, kw_only=True)
class PackChoice:
    """Whether a weight of a graph is packed. axis: its reduction axis as stored, None when its users
    disagree.

    reason: why it stays dense, None when it is packed.
    """

    weight: str
    shape: Shape
    axis: int | None
    reason: str | None


def pack_choices(model: onnx.ModelProto) -> tuple[PackChoice, ...]:
    """Every initializer that is a layer's weight, in stored order, and whether `pack` packs it.

    A weight is packed when every use of it is as the weight of a Conv, ConvTranspose, Gemm or MatMul,
    directly or through DequantizeLinear with zero point 0, QuantizeLinear, Cast, Identity and Transpose, all
    with one reduction axis along which it is 2:4. Uses in the branches of an If and in loops count likewise.
    """
    uses = _Uses(model)
    choices = []
    for tensor in model.graph.initializer:
        axes, reason = uses.of_weight(tensor)
        if not axes:
            continue
        axis = axes.pop() if len(axes) == 1 else None
        if reason is None and axis is None:
            reason = "its layers reduce over different axes"
        if reason is None and axis is not None:
            reason = _why_not(tensor, axis)
        choices.append(PackChoice(weight=tensor.name, shape=tuple(tensor.dims), axis=axis, reason=reason))
    return tuple(choices)


def _why_not(tensor: TensorProto, axis: int) -> str | None:
    shape = tuple(tensor.dims)
    if tensor.data_type not in BITS:
        return f"it is {type_name(tensor.data_type)}"
    if 0 in shape:
        return "it has no entries"
    if not has_groups(shape, axis):
        return f"axis {axis} has {shape[axis]} entries, no multiple of 4"
    if tensor.data_location == TensorProto.EXTERNAL:
        return "its values lie in another file and were not loaded"
    groups = groups_of(bits_of(numpy_helper.to_array(tensor), tensor.data_type), axis)
    n_over = groups_over(nonzero_mask(groups))
    return f"{n_over} of {len(groups)} groups have more than 2 nonzeros in 4" if n_over else None


class _Uses:
    """Who reads what in a graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.by_name: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        self.elsewhere: dict[str, str] = {}
        self.constants: dict[str, TensorProto] = {}
        main = model.graph
        for graph in graphs_of(main):
            where = "the graph" if graph is main else "a subgraph"
            self.elsewhere |= {value.name: f"it is also an output of {where}" for value in graph.output}
            self.elsewhere |= {value.name: f"it is also an input of {where}" for value in graph.input}
            self.constants |= {tensor.name: tensor for tensor in graph.initializer}
            for node in graph.node:
                self._see(node)

    def _see(self, node: onnx.NodeProto) -> None:
        for slot, name in enumerate(node.input):
            self.by_name.setdefault(name, []).append((node, slot))
        if node.op_type == "Constant" and node.domain in ONNX_DOMAINS:
            for found in node.attribute:
                if found.name == "value":
                    self.constants[node.output[0]] = found.t

    def of_weight(self, tensor: TensorProto) -> tuple[set[int], str | None]:
        """The reduction axes, as stored, of the layers whose weight this is; why it must stay as it is, if
        so.
        """
        axes: set[int] = set()
        reason: str | None = None
        rank = len(tensor.dims)
        seen: set[str] = set()
        waiting = [(tensor.name, tuple(range(rank)))]
        while waiting:
            name, order = waiting.pop()  # order: for each axis of this tensor, the axis as stored
            if name in seen:
                continue
            seen.add(name)
            reason = reason or self.elsewhere.get(name)
            shadow = TensorProto(dims=[tensor.dims[axis] for axis in order])
            for node, slot in self.by_name.get(name, []):
                found = layer_weight(node, {name: shadow}) if len(node.input) > 1 else None
                if found is not None and slot == (1 if node.input[1] == name else 0):
                    axes.add(order[found[1]])
                elif slot == 0 and (after := self._through(node, order)) is not None:
                    reason = reason or self._zero_point(node)
                    waiting.append((node.output[0], after))
                else:
                    reason = reason or f"{node.op_type} {node.name or node.output[0]} uses it too"
        return axes, reason

    def _through(self, node: onnx.NodeProto, order: Shape) -> Shape | None:
        """The axes behind a node that keeps zeros zero and moves at most axes; None for another node."""
        if node.domain not in ONNX_DOMAINS or not node.output:
            return None
        if node.op_type in ("DequantizeLinear", "QuantizeLinear", "Cast", "Identity"):
            return order
        if node.op_type == "Transpose":
            perm = next((tuple(a.ints) for a in node.attribute if a.name == "perm"), None)
            perm = tuple(reversed(range(len(order)))) if perm is None else perm
            return tuple(order[axis] for axis in perm) if sorted(perm) == list(range(len(order))) else None
        return None

    def _zero_point(self, node: onnx.NodeProto) -> str | None:
        if (
            node.op_type not in ("DequantizeLinear", "QuantizeLinear")
            or len(node.input) < 3
            or not node.input[2]
        ):
            return None
        constant = self.constants.get(node.input[2])
        if constant is None or constant.data_location == TensorProto.EXTERNAL:
            return f"the zero point of {node.name or node.output[0]} is not known"
        if np.any(numpy_helper.to_array(constant).astype(np.float32) != 0):
            return f"the zero point of {node.name or node.output[0]} is not 0"
        return None
