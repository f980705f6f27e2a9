"""The channels of a graph's values: which go together, which are constant, who sums over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx

from sparse_export.graph.channels.onnx_graph import Array, Graph, Shape, captured, title

REAL = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))


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

    w_OIK: its weight as outputs, inputs, and whatever is summed over besides.  in_axis, out_axis: of the
    weight as it is stored.  scale: what the product is multiplied by.  reads_OI: whether an output channel
    has a weight other than zero for an input channel.  foldable: inputs whose contribution is known and the
    same everywhere in the output.  constant: of the inputs.  groups: 1, or the groups of a convolution, whose
    channels leave only as whole groups; then in_slots is empty.
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
class Channels:
    """The channels of a graph.

    values: by tensor name; a tensor that is not there has no channels that could be removed.  weights: by
    name and axis, the slots of an array's axis.  edges: slots that can only go together.  pins: slots that
    cannot go, with the reason.  layers: who sums over channels.
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

    def visit(self, node: onnx.NodeProto, rule: Rule | None) -> None:
        """Go past a node, in the order of the graph.

        What its rule does not understand keeps all its channels.
        """
        understood = rule is not None and sum(map(bool, node.output)) >= 1 and rule(self, node)
        if not understood:
            for name in {*node.input, *captured(node)}:
                self._pin_value(name, f"{title(node)} needs every channel of it")
            for name in node.output:
                self.values.pop(name, None)
        claimed = self._claimed_by.get(node.output[0], set()) if understood and node.output else set()
        for name in {*node.input, *captured(node)} & self.graph.arrays.keys() - claimed:
            self._claims.setdefault(name, set()).add(())  # read as a whole

    def end(self) -> None:
        """Say after the last node what the graph's outputs need, and constants that are read in different
        ways.
        """
        for value in self.graph.model.graph.output:
            self._pin_value(value.name, "it is an output of the graph")
            self._claims.setdefault(value.name, set()).add(())
        for name, claims in self._claims.items():
            if len(claims) > 1:
                for axis in {axis for claim in claims for axis in claim}:
                    self.pin(self.weights[name, axis], f"{name} is used in different ways")

    def array(self, node: onnx.NodeProto, index: int) -> Array | None:
        """The constant that is an input of a node, None where it is absent or no constant."""
        name = node.input[index] if index < len(node.input) else ""
        return self.graph.arrays.get(name)

    def given(self, node: onnx.NodeProto, index: int) -> bool:
        return index < len(node.input) and bool(node.input[index])


# What a node says of the channels, told to the Channels; False where it does not understand the node.
Rule = Callable[[Channels, onnx.NodeProto], bool]
