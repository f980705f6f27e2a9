"""Outputs whose length depends on data, such as the boxes that NonMaxSuppression leaves, and what they come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx

from sparse_export.errors import UsageError
from sparse_export.graph.concrete import free_sizes, shapes_at, two_examples
from sparse_export.graph.layers import FLOATS
from sparse_export.graph.names import graphs_of
from sparse_export.graph.shapes import tensor_types

__all__ = ["last_fixed_ancestors"]


def last_fixed_ancestors(
    model: onnx.ModelProto, output: str, *, sizes: Mapping[str, int] | None = None
) -> tuple[str, ...]:
    """Find what an output of data-dependent size is made of, where the sizes still follow from the inputs'.

    Two versions of a network can be compared there number by number, and not at the output itself.

    Args:
        model: as `open_model` opens it; not changed.
        output: its name.
        sizes: an example by the name of each free size that the network takes, where others would not do.

    Returns:
        Names of the nearest values of floats; of the inputs that it depends on where no other value is of
        fixed size. Empty for an output of fixed size, and for one that depends on no input.

    Raises:
        UsageError: there is no such output.
    """
    graph = model.graph
    if output not in {value.name for value in graph.output}:
        raise UsageError(
            f"The network has no output {output}.",
            expected=f"Its outputs are {', '.join(value.name for value in graph.output)}.",
        )
    examples = two_examples(free_sizes(model))[0] | dict(sizes or {})
    shapes = shapes_at(model, examples)
    fixed = {name for name, shape in shapes.items() if None not in shape}
    if output in fixed:
        return ()
    types = tensor_types(graph)
    makers = {name: node for node in graph.node for name in node.output if name}
    stored = {tensor.name for tensor in graph.initializer}
    stored |= {tensor.values.name for tensor in graph.sparse_initializer}
    inputs = {value.name for value in graph.input} - stored
    of_data = set(inputs)
    for node in graph.node:
        if not _takes_sizes_only(node, fixed) and not of_data.isdisjoint(_sources(node)):
            of_data.update(node.output)
    found: dict[str, None] = {}
    reached: dict[str, None] = {}
    waiting, seen = [output], {output}
    while waiting:
        name = waiting.pop(0)
        if name in inputs:
            reached[name] = None
        elif name in fixed and name in types and types[name].elem_type in FLOATS:
            found[name] = None
        elif name in makers:
            sources = dict.fromkeys(one for one in _sources(makers[name]) if one in of_data - seen)
            seen.update(sources)
            waiting += sources
    return tuple(found or reached)


def _takes_sizes_only(node: onnx.NodeProto, fixed: set[str]) -> bool:
    return node.op_type in ("Shape", "Size") and node.input[0] in fixed


def _sources(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads, and what the graphs inside it do; names of values inside these are among them."""
    yield from filter(None, node.input)
    for found in node.attribute:
        for inner in (*found.graphs, *([found.g] if found.HasField("g") else [])):
            for graph in graphs_of(inner):
                yield from (name for below in graph.node for name in below.input if name)
                yield from (value.name for value in graph.output)
