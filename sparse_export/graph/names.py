"""Names of the values of a graph: which are taken, and others in their place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import onnx

__all__ = [
    "free_name",
    "graphs_in",
    "graphs_of",
    "inner_graphs",
    "names_of_values",
    "node_lists",
    "rename_values",
]

# Types of attributes that have graphs; old files do not say the type.
_WITH_GRAPHS = frozenset(
    (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS, onnx.AttributeProto.UNDEFINED)
)


def names_of_values(graph: onnx.GraphProto) -> set[str]:
    """Every name of a value in a graph, and in the graphs inside it."""
    found: set[str] = set()

    def note(name: str) -> str:
        found.add(name)
        return name

    _visit(graph, note)
    return found - {""}


def free_name(wanted: str, taken: Collection[str]) -> str:
    """The name, or that with as many underscores behind it as make it free."""
    while wanted in taken:
        wanted += "_"
    return wanted


def rename_values(graph: onnx.GraphProto, new: Mapping[str, str]) -> None:
    """Give values of a graph other names, in place, wherever they are named, in the graphs inside it too.

    Args:
        graph: in which no name of an inner graph hides one outside, as ONNX demands.
        new: the new name by the old one. Together with the names that stay they are all different.
    """
    _visit(graph, lambda name: new.get(name, name))


def _visit(graph: onnx.GraphProto, change: Callable[[str], str]) -> None:
    for one in graphs_of(graph):
        tensors = (*one.initializer, *(sparse.values for sparse in one.sparse_initializer))
        for value in (*tensors, *one.input, *one.output, *one.value_info):
            value.name = change(value.name)
        for node in one.node:
            node.input[:] = [change(name) if name else name for name in node.input]
            node.output[:] = [change(name) if name else name for name in node.output]


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those inside it."""
    yield graph
    yield from inner_graphs(graph.node)


def inner_graphs(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    """The graphs inside nodes, and those inside these."""
    waiting = graphs_in(nodes)[::-1]
    while waiting:
        graph = waiting.pop()
        yield graph
        waiting += graphs_in(graph.node)[::-1]


def graphs_in(nodes: Iterable[onnx.NodeProto]) -> list[onnx.GraphProto]:
    """The graphs inside nodes, without those inside these."""
    graphs = []
    for node in nodes:
        for found in node.attribute:
            if found.type in _WITH_GRAPHS:
                graphs += found.graphs
                if found.HasField("g"):
                    graphs.append(found.g)
    return graphs


def node_lists(model: onnx.ModelProto) -> Iterator[Sequence[onnx.NodeProto]]:
    """The nodes of each graph and each function of a model."""
    for graph in graphs_of(model.graph):
        yield graph.node
    for function in model.functions:
        yield function.node
        for graph in inner_graphs(function.node):
            yield graph.node
