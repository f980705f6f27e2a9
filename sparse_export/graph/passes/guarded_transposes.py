"""Transposes that onnxruntime's MatmulTransposeFusion ends the process over, in a graph of float16."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import onnx
from onnx import helper

from sparse_export.graph.names import free_name, graphs_in

__all__ = ["guard_transposes"]


def guard_transposes(graph: onnx.GraphProto, taken: set[str]) -> int:
    """Put a Concat of that one value behind each of these Transposes.

    Without it onnxruntime up to 1.31 ends with a segmentation fault when it loads a graph where a MatMul of
    float16 reads a constant and a Transpose that moves the first axis to one of the last two places, as
    `torch.nn.TransformerEncoder` with the batch second does.

    Args:
        graph: changed. Its branches and loops stay as they are.
        taken: names that no new value may have; those that are added come in.

    Returns:
        The number of places.
    """
    varying = _varying(graph)
    readers = Counter(name for node in graph.node for name in node.input)
    made = {name: node for node in graph.node for name in node.output}
    nodes: list[onnx.NodeProto] = []
    n_guarded = 0
    for node in graph.node:
        if node.op_type == "MatMul" and len(set(node.input) & varying) == 1:
            (place,) = (at for at, name in enumerate(node.input) if name in varying)
            if _is_batch_moved(node.input[place], made, readers):
                kept = free_name(f"{node.input[place]}_kept", taken)
                taken.add(kept)
                nodes.append(helper.make_node("Concat", [node.input[place]], [kept], kept, axis=0))
                node.input[place] = kept
                n_guarded += 1
        nodes.append(node)
    if n_guarded:
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)
    return n_guarded


def _varying(graph: onnx.GraphProto) -> set[str]:
    """The values that depend on the graph's inputs."""
    stored = {tensor.name for tensor in graph.initializer}
    found = {value.name for value in graph.input} - stored
    for node in graph.node:
        inner = graphs_in([node])
        if inner or found.intersection(node.input):
            found.update(node.output)
    return found


def _is_batch_moved(name: str, made: Mapping[str, onnx.NodeProto], readers: Mapping[str, int]) -> bool:
    """Did such a Transpose make the value, also before a Cast, for one reader?"""
    node = made.get(name)
    while node is not None and node.op_type in ("Cast", "Identity"):
        node = made.get(node.input[0])
    if node is None or node.op_type != "Transpose" or readers[node.output[0]] > 1:
        return False
    order = next((list(one.ints) for one in node.attribute if one.name == "perm"), [])
    return len(order) > 2 and order.index(0) >= len(order) - 2
