"""Where the values of a graph come from, also in the graphs inside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import onnx

from sparse_export.graph.nodes import is_standard, node_name
from sparse_export.graph.stored_tensors import Stored

_RANDOM = frozenset(
    (
        "RandomNormal",
        "RandomUniform",
        "RandomNormalLike",
        "RandomUniformLike",
        "Multinomial",
        "Bernoulli",
    )
)


@dataclass(frozen=True, eq=False)
class Scope:
    """The values of one graph by name; those of the graph around it are visible too.

    Attributes:
        path: of the graph from the model's graph, which has "".
        nodes: in their order.
        names: of the nodes, all different.
        stored: initializers by name.
        inputs: names of the inputs that are not initializers.
        overridable: names of initializers that the caller may replace.
        parent: the graph around it.
        producers: the node that computes a value, by its name.
        constant: names of the values of nodes that depend on no input.
    """

    path: str
    nodes: Sequence[onnx.NodeProto]
    names: Sequence[str]
    stored: dict[str, Stored]
    inputs: frozenset[str]
    overridable: frozenset[str]
    parent: Scope | None
    producers: dict[str, onnx.NodeProto] = field(default_factory=dict)
    constant: set[str] = field(default_factory=set)

    def find(self, name: str) -> tuple[Scope, onnx.NodeProto | Stored] | None:
        """Find the source of a value, in this graph or one around it.

        Args:
            name: of the value.

        Returns:
            Its scope, with the node or the stored tensor; None for an input and an unknown name.
        """
        scope: Scope | None = self
        while scope is not None:
            found = scope.stored.get(name) or scope.producers.get(name)
            if found is not None:
                return scope, found
            if name in scope.inputs:
                return None
            scope = scope.parent
        return None

    def is_constant(self, name: str) -> bool:
        """Does the value depend on no input?

        Args:
            name: of the value.

        Returns:
            True for an initializer, even if the caller may override it.
        """
        found = self.find(name)
        if found is None:
            return False
        scope, what = found
        return not isinstance(what, onnx.NodeProto) or name in scope.constant


def scopes(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> Iterator[Scope]:
    """Go through the graph of a model and all graphs inside it, as the branches of an If.

    Args:
        model: whose graphs they are.
        nodes: of the model's graph, which may differ from those it stores.

    Yields:
        The scope of each graph, an outer one before those inside it.
    """
    yield from _scopes(model.graph, nodes, None, "", overrides=model.ir_version >= 4)


def _scopes(
    graph: onnx.GraphProto,
    nodes: Sequence[onnx.NodeProto],
    parent: Scope | None,
    path: str,
    *,
    overrides: bool,
) -> Iterator[Scope]:
    stored: dict[str, Stored] = {tensor.name: tensor for tensor in graph.initializer}
    stored |= {tensor.values.name: tensor for tensor in graph.sparse_initializer}
    inputs = frozenset(value.name for value in graph.input)
    # Before IR version 4 every initializer had to be listed as an input, so the list says nothing.
    overridable = inputs.intersection(stored) if overrides else frozenset[str]()
    names = _unique_names(nodes)
    scope = Scope(path, nodes, names, stored, inputs - stored.keys(), overridable, parent)
    for node in nodes:
        is_constant = _is_function_of_inputs(node) and all(
            not name or scope.is_constant(name) for name in node.input
        )
        for name in node.output:
            scope.producers.setdefault(name, node)  # the first, so that a wrong graph cannot make a circle
            if is_constant:
                scope.constant.add(name)
    yield scope
    for node, known_as in zip(nodes, names, strict=True):
        for name, inner in _subgraphs(node):
            below = f"{path}{known_as}/{name}/"
            yield from _scopes(inner, inner.node, scope, below, overrides=False)


def _subgraphs(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.GraphProto]]:
    for found in node.attribute:
        if found.HasField("g"):
            yield found.name, found.g
        yield from ((f"{found.name}{i}", graph) for i, graph in enumerate(found.graphs))


def _is_function_of_inputs(node: onnx.NodeProto) -> bool:
    if any(True for _ in _subgraphs(node)):
        return False
    if is_standard(node):
        return node.op_type not in _RANDOM and (bool(node.input) or node.op_type == "Constant")
    return bool(node.input)


def _unique_names(nodes: Sequence[onnx.NodeProto]) -> list[str]:
    """Names of nodes, the second of a name with `#2` appended: ONNX does not require unique names."""
    taken = {node_name(node) for node in nodes}
    n_seen: Counter[str] = Counter()
    names = []
    for node in nodes:
        name = known_as = node_name(node)
        n_seen[name] += 1
        while n_seen[name] > 1 and known_as in taken:
            known_as = f"{name}#{n_seen[name]}"
            n_seen[name] += known_as in taken
        taken.add(known_as)
        names.append(known_as)
    return names
