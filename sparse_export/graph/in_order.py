"""Whether a graph already is as every stage wants it, so that it need not be taken apart and put together."""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from sparse_export.graph.names import graphs_in

__all__ = ["is_in_order"]

_FIRST_IR_OF_PLAIN_WEIGHTS = 4  # before it every stored tensor had to be listed as an input


class _NotInOrderError(Exception):
    """Something is to be done about the graph."""


def is_in_order(model: onnx.ModelProto) -> bool:
    """Is there nothing to lift, to sort, to take out or to refuse in a model?

    That is: every value that a node reads is made before, under a name that nothing else has; every value
    that a node makes is read, or is an output; stored tensors are those of the main graph, and no Constant
    makes one; and nothing is written that means the same as nothing.

    Args:
        model: not changed. Whether its operators are used rightly is not looked at.
    """
    if model.ir_version < _FIRST_IR_OF_PLAIN_WEIGHTS or model.functions:
        return False
    graph = model.graph
    stored = [tensor.name for tensor in graph.initializer]
    inputs = [value.name for value in graph.input]
    given = set(inputs)
    plain = [name for name in stored if name not in given]
    if graph.sparse_initializer or len(set(stored)) < len(stored):
        return False
    is_read: dict[str, bool] = {}
    try:
        _define(is_read, (*inputs, *plain))
        _walk(graph, is_read)
    except _NotInOrderError:
        return False
    return all(is_read[name] for name in plain)


def _define(is_read: dict[str, bool], names: Iterable[str]) -> None:
    for name in names:
        if not name or name in is_read:
            raise _NotInOrderError
        is_read[name] = False


def _read(is_read: dict[str, bool], names: Iterable[str]) -> None:
    for name in names:
        if name:
            if name not in is_read:
                raise _NotInOrderError
            is_read[name] = True


def _walk(graph: onnx.GraphProto, is_read: dict[str, bool]) -> list[str]:
    """Note what the nodes of a graph read. is_read: names that are seen from it. Returns what they make."""
    made: list[str] = []
    for node in graph.node:
        names = list(node.input)
        if (names and not names[-1]) or _means_nothing(node):
            raise _NotInOrderError
        _read(is_read, names)
        for inner in graphs_in((node,)):
            if inner.initializer or inner.sparse_initializer:
                raise _NotInOrderError
            own = [value.name for value in inner.input]
            _define(is_read, own)
            made_inside = _walk(inner, is_read)
            for name in (*own, *made_inside):
                del is_read[name]
        _define(is_read, node.output)
        made += node.output
    outputs = [value.name for value in graph.output]
    _read(is_read, outputs)
    if len(set(outputs)) < len(outputs) or not all(is_read[name] for name in made):
        raise _NotInOrderError
    return made


def _means_nothing(node: onnx.NodeProto) -> bool:
    """Is it a stored tensor in the guise of a node, makes it nothing, or does it say what goes without saying?"""
    if node.op_type == "Constant" or not node.output:
        return True
    return node.op_type == "BatchNormalization" and any(one.name == "training_mode" for one in node.attribute)
