"""Which integers the inputs of a graph take, as far as what it does with them tells."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np
import onnx

from sparse_export.graph.names import graphs_of
from sparse_export.graph.nodes import attribute, is_standard
from sparse_export.graph.shapes import SMALL, n_entries, tensor_types
from sparse_export.graph.stored_tensors import array_of
from sparse_export.signature import Array

__all__ = ["integer_ranges"]

_INTEGERS = frozenset(
    getattr(onnx.TensorProto, f"{sign}INT{bits}") for sign in ("", "U") for bits in (8, 16, 32, 64)
)
_SAME = frozenset(
    ("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Tile", "Slice")
)
_COMPARED = frozenset(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"))
_WITH_A_MASK = frozenset(
    ("Mul", "ReduceSum", "ReduceMax", "Shape", "Size", "And", "Or", "Not", "CumSum", "Add")
)
_Uses = Mapping[str, list[tuple[onnx.NodeProto, int]]]


def integer_ranges(model: onnx.ModelProto) -> dict[str, tuple[int, int]]:
    """Determine the smallest and largest value of integer inputs.

    An input that is looked up in a table takes the numbers of the table's rows; one that is compared with 0,
    1, …, n - 1, or made one-hot, takes these; one that only makes a mask takes 0 and 1.

    Args:
        model: as `open_model` opens it.

    Returns:
        By the name of the input. Those of which the graph tells nothing, and scalars, are left out.
    """
    uses: dict[str, list[tuple[onnx.NodeProto, int]]] = defaultdict(list)
    makers: dict[str, onnx.NodeProto] = {}
    for graph in graphs_of(model.graph):
        for node in graph.node:
            for position, name in enumerate(node.input):
                uses[name].append((node, position))
            makers.update((name, node) for name in node.output)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    known = _Known(stored, makers, tensor_types(model.graph))
    found = {}
    for value in model.graph.input:
        kind = value.type.tensor_type
        if value.name in stored or kind.elem_type not in _INTEGERS or not kind.shape.dim:
            continue
        places = list(_places(value.name, uses))
        lengths = [n for node, at, _ in places if (n := known.n_places(node, at)) is not None]
        if lengths:
            found[value.name] = (0, min(lengths) - 1)
        elif any(known.tells_a_mask(*place) for place in places) and all(
            known.tells_a_mask(*place) or place[0].op_type in _WITH_A_MASK for place in places
        ):
            found[value.name] = (0, 1)
    return found


def _places(name: str, uses: _Uses) -> Iterator[tuple[onnx.NodeProto, int, bool]]:
    """The nodes that an input gets to with its values as they are, each with the position and whether it is a
    number of another type there.
    """
    waiting = [(name, False)]
    seen = {name}
    while waiting:
        at, is_cast = waiting.pop()
        for node, position in uses.get(at, ()):
            passes = is_standard(node) and position == 0 and node.op_type in _SAME | {"Cast"}
            if not passes:
                yield node, position, is_cast
                continue
            to = attribute(node, "to", 0) if node.op_type == "Cast" else 0
            if to == onnx.TensorProto.BOOL:
                yield node, position, is_cast
                continue
            for output in node.output:
                if output not in seen:
                    seen.add(output)
                    waiting.append((output, is_cast or (to != 0 and to not in _INTEGERS)))


class _Known:
    """What is stored in a graph, and the shapes in it."""

    def __init__(
        self,
        stored: Mapping[str, onnx.TensorProto],
        makers: Mapping[str, onnx.NodeProto],
        types: Mapping[str, onnx.TypeProto.Tensor],
    ) -> None:
        self._stored = stored
        self._makers = makers
        self._types = types

    def n_places(self, node: onnx.NodeProto, position: int) -> int | None:
        """How many values an index can have that a node gets; None where it is none."""
        if not is_standard(node):
            return None
        if node.op_type in ("Gather", "GatherElements") and position == 1:
            shape = self._types.get(node.input[0], onnx.TypeProto.Tensor()).shape.dim
            axis = attribute(node, "axis", 0)
            inside = -len(shape) <= axis < len(shape)
            return (shape[axis].dim_value or None) if inside else None
        if node.op_type == "OneHot" and position == 0:
            depth = self._array(node.input[1])
            return int(depth.item()) if depth is not None and depth.size == 1 else None
        if node.op_type == "Equal":
            other = self._array(self._source(node.input[1 - position]))
            if other is not None and other.size > 2 and np.array_equal(other.ravel(), np.arange(other.size)):
                return int(other.size)
        return None

    def tells_a_mask(self, node: onnx.NodeProto, position: int, is_cast: bool) -> bool:
        """Does a node take its input as 0 or 1?"""
        if node.op_type == "Cast":  # to bool; others are passed
            return True
        if node.op_type == "Where":
            return position == 0
        other = self._array(node.input[1 - position]) if len(node.input) == 2 else None
        if other is None or other.size != 1:
            return False
        if node.op_type == "Sub":
            return position == 1 and bool(other.item() == 1)
        return node.op_type in _COMPARED and other.item() in (0, 0.5, 1) and not is_cast

    def _source(self, name: str) -> str:
        """The stored tensor that a value repeats or lays out."""
        for _ in range(16):
            node = self._makers.get(name)
            if node is None or node.op_type not in _SAME - {"Slice", "Transpose"} | {"Cast"}:
                break
            name = node.input[0]
        return name

    def _array(self, name: str) -> Array | None:
        tensor = self._stored.get(name)
        return None if tensor is None or n_entries(tensor) > SMALL else array_of(tensor)
