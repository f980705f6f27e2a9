"""The functions that a model brings along, written out where they are called."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
import onnx.inliner
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from sparse_export.errors import ArtefactError
from sparse_export.graph.names import node_lists

__all__ = ["MAX_INLINED_NODES", "inlined"]

MAX_INLINED_NODES = 20_000
"""More only of a model that has half as many nodes itself: a small file could ask for any number."""


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace the calls of a model's own functions by what they do.

    Functions that cannot be inlined (of another opset, or making too many nodes) stay.

    Args:
        model: below 2 GB, so without the data of its weights; not changed.

    Returns:
        Another model, or the same where there is nothing to inline.

    Raises:
        ArtefactError: a function calls itself, or two have one name.
    """
    if not model.functions:
        return model
    n_written = sum(len(nodes) for nodes in node_lists(model))
    if _n_inlined(model) > max(MAX_INLINED_NODES, 2 * n_written):
        return model
    try:
        return onnx.inliner.inline_local_functions(model)
    except onnx.checker.ValidationError as cause:
        raise ArtefactError(
            f"The model's functions are invalid: {str(cause).strip().rstrip('.')}.",
            do="Give each function a name of its own: export the model again.",
        ) from cause
    except (RuntimeError, ValueError, DecodeError):  # its own words are no use; the calls are told as such
        return model


def _n_inlined(model: onnx.ModelProto) -> int:
    """How many nodes there will be. Raises ArtefactError for a function that calls itself."""
    functions = {(function.domain, function.name): function for function in model.functions}
    sizes: dict[tuple[str, str], int] = {}
    open_calls: list[tuple[str, str]] = []

    def count(nodes: Iterable[onnx.NodeProto]) -> int:
        total = 0
        for node in nodes:
            key = (node.domain, node.op_type)
            total += size(key) if key in functions else 1
            for found in node.attribute:
                graphs = (*([found.g] if found.HasField("g") else []), *found.graphs)
                total += sum(count(graph.node) for graph in graphs)
        return total

    def size(key: tuple[str, str]) -> int:
        if key in open_calls or len(open_calls) > 100:
            raise ArtefactError(
                f"The function {'::'.join(key)} of the model calls itself.",
                expected="Functions that do not call themselves were expected.",
                do="Export the model again.",
            )
        if key not in sizes:
            open_calls.append(key)
            sizes[key] = count(functions[key].node)
            open_calls.pop()
        return sizes[key]

    return count(model.graph.node)
