"""Constants that stand for a limit, as the lowest value of a mask does, and are no weights.

A mask of attention holds -inf, the lowest float32 or a number like -1e9 where nothing may come through. What
it says is 'lower than all': in a smaller type, that is the lowest value of this type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import onnx

from sparse_export.graph.names import graphs_of
from sparse_export.signature import Array

__all__ = ["Limits", "limits_of"]

Limits = Callable[[str, Array], Array]

_LARGEST = float(np.finfo(np.float32).max)
_LAYOUT = frozenset(("Identity", "Cast", "Expand", "Reshape", "Flatten", "Unsqueeze", "Squeeze", "Transpose"))
_PARTS = frozenset(("Slice", "Gather", "Concat", "Tile", "Trilu"))
# On the way of a mask to what it masks; 1 - m, times the lowest value, is a mask too.
_MASKING = _LAYOUT | _PARTS | {"Where", "Add", "Sub", "Mul"}
_ONLY_THE_LARGEST_COUNT = frozenset(("Softmax", "LogSoftmax", "ReduceMax", "ArgMax"))
_CHOOSING = frozenset(("Where", "Max", "Min", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"))
_CLIPPING = frozenset(("Clip",))


def limits_of(graph: onnx.GraphProto) -> Limits:
    """Which entries of a constant of the graph are limits.

    Args:
        graph: with the graphs inside it; what a branch or loop gives out is taken for an output.

    Returns:
        A function of the name of an initializer, or of the output of a node that holds the constant, and its
        float32 values. It gives True for those that are limits: finite ones, which a smaller type may replace
        by its own largest or lowest. They are the negative values of what ends in a softmax or a maximum, the
        bounds of a Clip, and the largest float32 of either sign where it is chosen or compared.
    """
    users: dict[str, list[onnx.NodeProto]] = {}
    ends: set[str] = set()
    for one in graphs_of(graph):
        ends.update(value.name for value in one.output)
        for node in one.node:
            for name in node.input:
                users.setdefault(name, []).append(node)

    def reached(name: str, through: frozenset[str]) -> set[str]:
        """Operators that a value ends in, behind those that it goes through; an output of the graph is no
        operator.
        """
        found: set[str] = set()
        seen: set[str] = set()
        waiting = [name]
        while waiting:
            value = waiting.pop()
            if value in seen:
                continue
            seen.add(value)
            if value in ends:
                found.add("")
            for node in users.get(value, ()):
                if node.op_type in through:
                    waiting.extend(node.output)
                else:
                    found.add(node.op_type)
        return found

    def limits(name: str, values: Array) -> Array:
        found = np.zeros(values.shape, dtype=bool)
        if _all(reached(name, _MASKING), _ONLY_THE_LARGEST_COUNT):
            found |= np.isfinite(values) & (values < 0)
        chosen = _ONLY_THE_LARGEST_COUNT | _CHOOSING | _CLIPPING
        if _all(reached(name, _MASKING - _CHOOSING), chosen):
            found |= np.abs(values) == _LARGEST
        if _all(reached(name, _LAYOUT), _CLIPPING):
            found |= np.isfinite(values)
        return found

    return limits


def _all(found: Iterable[str], allowed: frozenset[str]) -> bool:
    """Are there some, and all of them allowed?"""
    found = set(found)
    return bool(found) and found <= allowed
