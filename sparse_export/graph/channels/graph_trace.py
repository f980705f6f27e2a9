"""Runs an ONNX graph on labels: what each value is known to be, and which rule follows each node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator

from sparse_export.graph.channels import reasons
from sparse_export.graph.channels.labels import (
    FIXED,
    Labels,
    Ledger,
    UnknownOperation,
    fixed_labels,
    hash_of,
    mixed,
    positions,
)
from sparse_export.graph.channels.onnx_graph import Array, attribute, captured, title
from sparse_export.graph.channels.parameters import Found, Parameters, Undecided
from sparse_export.graph.concrete import Shape
from sparse_export.graph.nodes import ONNX_DOMAINS
from sparse_export.graph.output_sizes import n_made
from sparse_export.graph.shapes import n_entries
from sparse_export.graph.stored_tensors import array_of

__all__ = [
    "GraphTrace",
    "Lost",
    "Rule",
    "Value",
    "is_indifferent",
    "moved_by",
    "own_parameters",
    "settings_of",
]

_LARGEST_KNOWN = 1 << 22  # entries of a value that is worked out rather than followed
_REAL = frozenset(
    (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
)
_SETTINGS = {
    "DequantizeLinear": (1,),
    "NonMaxSuppression": (3, 4),
    "OneHot": (2,),
    "QuantizeLinear": (1,),
    "Range": (0, 1, 2),
    "Resize": (1, 2),
    "Upsample": (1,),
}


class Lost:
    """A value of which not even the shape is known."""


# An array where the numbers themselves are known, since no input and no weight has a part in them.
Value = Found | Array | Lost
Rule = Callable[["GraphTrace", onnx.NodeProto], Sequence[Value]]


def own_parameters(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """The stored tensors that values are computed with: floats that no caller may replace.

    What an operator takes as a setting, like the scales of a Resize, is none of them.
    """
    given = {value.name for value in model.graph.input} | settings_of(model.graph.node)
    return {
        tensor.name: tensor
        for tensor in model.graph.initializer
        if tensor.data_type in _REAL and n_entries(tensor) > 1 and tensor.name not in given
    }


def settings_of(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Names of values that operators take as settings."""
    return {
        node.input[at] for node in nodes for at in _SETTINGS.get(node.op_type, ()) if at < len(node.input)
    }


def is_indifferent(array: Array) -> bool:
    """Is it a vector of one number, which is the same in any order?"""
    return max(array.shape, default=1) == array.size and bool((array == array.reshape(-1)[0]).all())


def moved_by(
    node: onnx.NodeProto, opsets: Sequence[onnx.OperatorSetIdProto], inputs: Sequence[Any]
) -> list[Array]:
    """What a node makes of arrays, None for an absent input.

    Raises:
        UnknownOperation: that cannot be worked out.
    """
    bare = onnx.NodeProto()
    bare.CopyFrom(node)
    del bare.input[:]
    bare.input.extend("" if x is None else f"x{i}" for i, x in enumerate(inputs))
    feeds = {f"x{i}": x for i, x in enumerate(inputs) if x is not None}
    graph = helper.make_graph(
        [bare],
        "one",
        [helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None) for name in feeds],
        [
            helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None)
            for name in node.output
            if name
        ],
    )
    try:
        with np.errstate(all="ignore"):
            found = ReferenceEvaluator(helper.make_model(graph, opset_imports=list(opsets))).run(None, feeds)
    except Exception as cause:
        raise UnknownOperation(f"{node.op_type}: {cause}") from cause
    return [np.asarray(one) for one in found]


class GraphTrace:
    """One run of labels over a graph; what it learns is in `ledger`.

    Attributes:
        ledger: of which channels are one.
        parameters: what was decided of stored tensors.
        shapes: of values, at the sizes of this run.
        opset: of the standard operators.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        ledger: Ledger,
        axes: dict[str, int | None],
        shapes: Mapping[str, Shape],
        rules: Mapping[str, Rule],
        nodes: Sequence[onnx.NodeProto] | None = None,
        stored: Mapping[str, onnx.TensorProto | Array] | None = None,
    ) -> None:
        self.nodes = model.graph.node if nodes is None else nodes
        self.stored = (
            {tensor.name: tensor for tensor in model.graph.initializer} if stored is None else stored
        )
        self.model, self.ledger, self.parameters = model, ledger, Parameters(ledger, axes)
        self.shapes, self.rules = shapes, rules
        self.opset = next((e.version for e in model.opset_import if e.domain in ONNX_DOMAINS), 0)
        self.values: dict[str, Value] = {}
        self._names = Counter(title(node) for node in self.nodes)

    def run(self) -> None:
        """Follow the labels from the inputs to the outputs."""
        graph = self.model.graph
        for name in self.stored:
            if name not in self.ledger.shapes:  # those are made when they are read: places of all take memory
                self.values[name] = self._known(name)
        for value in graph.input:
            shape = self.shape_of(value.name)
            self.values[value.name] = Lost() if shape is None else fixed_labels(shape, value.name)
        left = Counter(name for node in self.nodes for name in _read_by(node))
        left.update(value.name for value in graph.output)
        for node in self.nodes:
            self._visit(node)
            for name in _read_by(node):
                left[name] -= 1
                if not left[name]:
                    self.values.pop(name, None)
        for value in graph.output:
            self._give_up(value.name, reasons.OUTPUT)

    def _known(self, name: str) -> Value:
        array = self.stored_array(name)
        if array.size <= _LARGEST_KNOWN or is_indifferent(array):
            return array
        return fixed_labels(array.shape, name)

    def stored_array(self, name: str) -> Array:
        """The values of a stored tensor."""
        found = self.stored[name]
        return found if isinstance(found, np.ndarray) else array_of(found)

    def find(self, name: str) -> Value:
        """What is known of a value."""
        if name in self.ledger.shapes:
            return Undecided(name, self.ledger.shapes[name])
        return self.values.get(name, Lost())

    def _visit(self, node: onnx.NodeProto) -> None:
        values = [self.find(name) if name else None for name in node.input]
        inner = list(captured(node))
        made: Sequence[Value] | None = None
        reason = reasons.unknown(self.where(node))
        try:
            if any(isinstance(value, Labels | Undecided) and 0 in _shape(value) for value in values):
                raise UnknownOperation("nothing of a value is left")
            if not inner and values and all(isinstance(value, np.ndarray | None) for value in values):
                made = self._computed(node, values)
            if made is None and not inner and node.domain in ONNX_DOMAINS:
                rule = self.rules.get(node.op_type)
                made = None if rule is None else rule(self, node)
        except UnknownOperation as cause:
            made = None
            reason = reasons.unknown(self.where(node), str(cause))
        is_known = made is not None and self._fit(node, made)
        if made is None or not is_known:
            for name in {*node.input, *inner}:
                self._give_up(name, reason)
            made = [self._fixed(name) for name in node.output]
        made = self.made_by(node, made, is_known=is_known)
        self.values.update((name, value) for name, value in zip(node.output, made, strict=False) if name)

    def made_by(self, node: onnx.NodeProto, made: Sequence[Value], *, is_known: bool) -> Sequence[Value]:
        """What a node makes, once a rule has said so; is_known: one did."""
        return made

    def _fit(self, node: onnx.NodeProto, made: Sequence[Value]) -> bool:
        """Have the results the shapes that the node makes?"""
        for name, value in zip(node.output, made, strict=False):
            shape = self.shape_of(name)
            if shape is not None and not isinstance(value, Lost) and _shape(value) != shape:
                return False
        return len(made) >= sum(map(bool, node.output))

    def _computed(self, node: onnx.NodeProto, values: Sequence[Any]) -> Sequence[Value] | None:
        """What a node makes of known numbers; None where that is not worked out."""
        n = n_made(node, values)
        if n is None or n > _LARGEST_KNOWN:
            return None
        try:
            return moved_by(node, self.model.opset_import, values)
        except UnknownOperation:
            return None

    def _fixed(self, name: str) -> Value:
        shape = self.shape_of(name)
        return Lost() if shape is None else fixed_labels(shape, name)

    def _give_up(self, name: str, reason: str) -> None:
        value = self.find(name)
        if isinstance(value, Undecided | Labels):
            self.parameters.give_up(value, reason)

    # What rules ask

    def where(self, node: onnx.NodeProto) -> str:
        """A node as messages call it; no two are called alike."""
        name = title(node)
        return name if self._names[name] == 1 else f"{name} ({node.output[0]})"

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """The shape of a value; None where a size of it is not known."""
        shape = self.shapes.get(name)
        return None if shape is None or None in shape else tuple(size for size in shape if size is not None)

    def made_shape(self, node: onnx.NodeProto) -> tuple[int, ...]:
        """The shape of what a node makes. Raises UnknownOperation where it is not known."""
        shape = self.shape_of(node.output[0])
        if shape is None:
            raise UnknownOperation("its shape depends on data")
        return shape

    def given(self, node: onnx.NodeProto, at: int) -> bool:
        """Has a node an input at this place?"""
        return at < len(node.input) and bool(node.input[at])

    def value(self, node: onnx.NodeProto, at: int) -> Found | Array:
        """An input of a node. Raises UnknownOperation where it is absent or nothing is known of it."""
        found = self.find(node.input[at]) if self.given(node, at) else None
        if found is None or isinstance(found, Lost):
            raise UnknownOperation("an input of unknown shape")
        return found

    def known(self, node: onnx.NodeProto, at: int) -> Array | None:
        """The numbers of an input, None where it is absent. Raises UnknownOperation where they depend on data."""
        if not self.given(node, at):
            return None
        found = self.value(node, at)
        if isinstance(found, np.ndarray):
            return found
        if isinstance(found, Undecided) and not found.tag:
            self.parameters.give_up(found, reasons.as_numbers(self.where(node)))
            whole: Array = self.stored_array(found.name).reshape(-1)[found.index.numpy()]
            return whole
        raise UnknownOperation("numbers that depend on data")

    def found(self, node: onnx.NodeProto, at: int) -> Found:
        """An input as labels, or as a parameter of which the axis is not decided."""
        value = self.value(node, at)
        return labels_of_known(value) if isinstance(value, np.ndarray) else value

    def labels(self, node: onnx.NodeProto, at: int = 0) -> Labels:
        """An input as labels."""
        return self.parameters.settle(self.found(node, at), None, self.where(node))

    def raw(self, node: onnx.NodeProto, at: int) -> str | None:
        """The name of a parameter that a node reads as it is.

        None where it is absent, or the same in any order.
        """
        if not self.given(node, at):
            return None
        value = self.value(node, at)
        if isinstance(value, np.ndarray) and is_indifferent(value):
            return None
        return self.parameters.raw(value if isinstance(value, Undecided) else None)

    def numbers(self, node: onnx.NodeProto, name: str, at: int) -> list[int] | None:
        """Whole numbers that older operators have as an attribute, and newer ones as an input."""
        found = self.known(node, at)
        if found is not None:
            return [int(n) for n in found.reshape(-1)]
        given = attribute(node, name, None)
        return None if given is None else list(given)


def labels_of_known(array: Array) -> Labels:
    """Labels of numbers that are known: equal ones are alike wherever they stand."""
    content = np.ascontiguousarray(array).reshape(array.shape)
    shape = content.shape
    even = [size == 1 for size in shape]
    for axis in range(content.ndim):
        first = content.take([0], axis)
        if content.shape[axis] > 1 and bool((content == first).all()):
            content, even[axis] = first, True
    if content.dtype.kind in "fiub":
        bits = np.ascontiguousarray(content.astype(np.float64) + 0.0).view(np.int64)
        words = torch.from_numpy(bits.reshape(content.shape).copy())
    else:
        words = positions(content.shape)
    atoms = torch.full(tuple(content.shape), FIXED)
    return Labels(atoms, mixed(words, hash_of("number")), shape, tuple(even))


def _read_by(node: onnx.NodeProto) -> set[str]:
    return {*node.input, *captured(node)} - {""}


def _shape(value: Value) -> tuple[int, ...]:
    assert isinstance(value, Undecided | Labels | np.ndarray)
    return tuple(value.shape)
