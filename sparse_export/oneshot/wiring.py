"""Which node of a graph reads and makes which values."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import onnx

from sparse_export.graph.channels.onnx_graph import captured
from sparse_export.graph.nodes import is_standard
from sparse_export.graph.scopes import scopes

__all__ = ["Wiring", "wiring_of"]


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """The nodes of a graph by index, in its order, and the values between them by name.

    Attributes:
        reads: of each node the values that it and the graphs inside it read, without repetition.
        makes: of each node the values that it makes.
        makers: the node that makes a value.
        stored: names of stored tensors.
        inputs: of the graph, without stored tensors.
        outputs: of the graph.
        constant: nodes whose values depend on no input of the graph.
        sizes: nodes that read the sizes of a value and no number in it.
        with_bodies: nodes with graphs inside them.
    """

    reads: tuple[tuple[str, ...], ...]
    makes: tuple[tuple[str, ...], ...]
    makers: dict[str, int]
    stored: frozenset[str]
    inputs: frozenset[str]
    outputs: tuple[str, ...]
    constant: frozenset[int]
    sizes: frozenset[int]
    with_bodies: frozenset[int]

    def constant_beside(self, nodes: Iterable[int]) -> frozenset[int]:
        """The constant nodes that are none of these, and depend on none of them."""
        excluded = set(nodes)
        for node in sorted(self.constant):
            if any(self.makers.get(name, -1) in excluded for name in self.reads[node]):
                excluded.add(node)
        return self.constant - excluded

    def leading_to(self, *, nodes: Collection[int] = (), outputs: bool = False) -> set[int]:
        """The nodes whose values reach one of `nodes`, or an output of the graph.

        A node of `nodes` counts only where its own values reach another.
        """
        wanted = {name for name in self.outputs if outputs}
        found = set()
        for node in reversed(range(len(self.reads))):
            if not wanted.isdisjoint(self.makes[node]):
                found.add(node)
            if node in found or node in nodes:
                wanted.update(self.reads[node])
        return found


def wiring_of(model: onnx.ModelProto) -> Wiring:
    """Read the wiring of a model's graph, whose nodes are in topological order."""
    graph = model.graph
    outer = next(scopes(model, graph.node))
    known = {name for node in graph.node for name in node.output if name}
    known |= outer.stored.keys() | outer.inputs
    reads, bodies = [], set()
    for index, node in enumerate(graph.node):
        inner = list(captured(node))
        if any(found.HasField("g") or found.graphs for found in node.attribute):
            bodies.add(index)
        reads.append(tuple(dict.fromkeys(name for name in (*node.input, *inner) if name in known)))
    makes = tuple(tuple(name for name in node.output if name) for node in graph.node)
    return Wiring(
        reads=tuple(reads),
        makes=makes,
        makers={name: index for index, names in enumerate(makes) for name in names},
        stored=frozenset(outer.stored),
        inputs=frozenset(outer.inputs),
        outputs=tuple(value.name for value in graph.output),
        constant=frozenset(
            index for index, names in enumerate(makes) if names and outer.constant.issuperset(names)
        ),
        sizes=frozenset(
            index
            for index, node in enumerate(graph.node)
            if is_standard(node) and node.op_type in ("Shape", "Size")
        ),
        with_bodies=frozenset(bodies),
    )
