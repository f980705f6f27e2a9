"""Branches of a graph that calibration inputs take every time, put in the place of the choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx
from onnx import helper

from sparse_export.graph.names import free_name, graphs_of, names_of_values, rename_values
from sparse_export.graph.nodes import is_standard, node_name
from sparse_export.graph.stored_tensors import Read, array_of
from sparse_export.oneshot.segments import segment_for
from sparse_export.oneshot.walk import Values, Walk
from sparse_export.oneshot.wiring import Wiring, wiring_of
from sparse_export.signature import Feeds

__all__ = ["with_taken_branches"]

_LAYERS = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))
_MOST_NODES = 1_000_000  # nested branches end before that


def with_taken_branches(
    model: onnx.ModelProto,
    batches: Sequence[Feeds],
    *,
    memory_bytes: int,
    provider: str = "cpu",
    read: Read = array_of,
) -> onnx.ModelProto:
    """Replace each If that holds layers, and whose condition is the same for all inputs, by its taken branch.

    Only such conditions are looked at as no layer has a part in, since pruning could change others.

    Args:
        model: with its nodes in order; not changed.
        batches: inputs by name, one batch at least.
        memory_bytes: bound of the values that are kept in memory meanwhile.
        provider: of onnxruntime.
        read: gives the values of what the model stores.

    Returns:
        Another model, or the same where there is no such If.

    Raises:
        ArtefactError: onnxruntime cannot work out a condition.
        MissingCapability: there is not enough memory, or not the provider.
    """
    left: set[str] = set()
    found = model
    while len(found.graph.node) < _MOST_NODES:
        wiring = wiring_of(found)
        index = next(
            (i for i in _candidates(found, wiring) if node_name(found.graph.node[i]) not in left), None
        )
        if index is None:
            break
        node = found.graph.node[index]
        taken = _taken(found, wiring, node.input[0], batches, memory_bytes, provider, read)
        if taken is None:
            left.add(node_name(node))
            continue
        if found is model:
            found = onnx.ModelProto()
            found.CopyFrom(model)
        _replace(found.graph, index, "then_branch" if taken else "else_branch")
    return found


def _candidates(model: onnx.ModelProto, wiring: Wiring) -> Iterator[int]:
    """The Ifs that hold layers, and whose condition does not hang on any."""
    after_layer: set[str] = set()
    for index, node in enumerate(model.graph.node):
        inner = [one for found in node.attribute if found.HasField("g") for one in graphs_of(found.g)]
        holds = any(below.op_type in _LAYERS for graph in inner for below in graph.node)
        if is_standard(node) and node.op_type == "If" and holds and node.input[0] not in after_layer:
            yield index
        if holds or node.op_type in _LAYERS or not after_layer.isdisjoint(wiring.reads[index]):
            after_layer.update(wiring.makes[index])


def _taken(
    model: onnx.ModelProto,
    wiring: Wiring,
    condition: str,
    batches: Sequence[Feeds],
    memory_bytes: int,
    provider: str,
    read: Read,
) -> bool | None:
    """What a condition is for all batches; None where it differs."""
    found: set[bool] = set()

    def see(_batch: int, values: Values) -> None:
        found.add(bool(np.asarray(values[condition]).reshape(-1)[0]))

    with Walk(
        model,
        wiring,
        [segment_for(wiring, condition)],
        batches,
        memory_bytes=memory_bytes,
        provider=provider,
        read=read,
    ) as walk:
        walk.run(see, [condition])
    return found.pop() if len(found) == 1 else None


def _replace(graph: onnx.GraphProto, index: int, branch: str) -> None:
    """Put a branch of the If at `index` in its place, in place."""
    choice = graph.node[index]
    body = next(found.g for found in choice.attribute if found.name == branch)
    taken = names_of_values(graph)
    own = {name for node in body.node for name in node.output if name}
    own |= {tensor.name for tensor in body.initializer}
    new: dict[str, str] = {}
    for name in sorted(own):
        new[name] = free_name(f"{node_name(choice)}/{name}", taken)
        taken.add(new[name])
    rename_values(body, new)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in body.node]
    for made, wanted in zip(body.output, choice.output, strict=True):
        if wanted:
            nodes.append(helper.make_node("Identity", [made.name], [wanted], name=wanted))
    for node in nodes:
        node.name = f"{node_name(choice)}/{node.name}" if node.name else ""
    graph.initializer.extend(body.initializer)
    graph.sparse_initializer.extend(body.sparse_initializer)
    before, after = list(graph.node[:index]), list(graph.node[index + 1 :])
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in (*before, *nodes, *after)]
    del graph.node[:]
    graph.node.extend(copies)
