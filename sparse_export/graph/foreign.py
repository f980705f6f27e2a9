"""Models that onnxruntime opens although onnx's own checker or loader refuses them.

They are no rarities: tools leave out the shape of an output, or write nodes in any order, and caches of
downloaded models hold links to the files.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator
from pathlib import Path, PurePath

import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from sparse_export.graph.names import graphs_of

__all__ = ["has_linked_data", "load_linked_data", "require_readable", "sort_nodes"]

_SMALL = 1024  # entries of a stored tensor that goes to the checker; it may tell a shape
_FIRST_IR_OF_PLAIN_WEIGHTS = 4  # before it every stored tensor had to be listed as an input


def require_readable(model: onnx.ModelProto) -> None:
    """Hold a model to onnx's checker but for what onnxruntime makes up for.

    That is: shapes and types of outputs and shapes of inputs that are missing, a graph without a name,
    domains of operators without a version, weights that an old model does not list as inputs, and a name that
    is stored twice.

    Args:
        model: with its nodes in order. Its stored tensors may lie in files that the checker does not open.

    Raises:
        onnx.checker.ValidationError: something else is wrong with it.
    """
    for tensor in model.graph.initializer:
        if not uses_external_data(tensor):
            onnx.checker.check_tensor(tensor)
    onnx.checker.check_model(_completed(model))


def _completed(model: onnx.ModelProto) -> onnx.ModelProto:
    """What the checker is to see of a model: without large weights, which become inputs, and with what is
    missing.
    """
    whole = onnx.ModelProto(ir_version=max(model.ir_version, _FIRST_IR_OF_PLAIN_WEIGHTS))
    if not model.ir_version:
        whole.ClearField("ir_version")
    whole.opset_import.extend(model.opset_import)
    whole.functions.extend(model.functions)
    graph = whole.graph
    graph.name = model.graph.name or "graph"
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    graph.sparse_initializer.extend(model.graph.sparse_initializer)
    for value in (*graph.input, *graph.output):
        if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape"):
            value.type.tensor_type.shape.SetInParent()
    for value in graph.output:
        if not value.HasField("type"):
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
            value.type.tensor_type.shape.SetInParent()
    inputs = {value.name for value in graph.input}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, tensor in stored.items():
        if math.prod(tensor.dims) <= _SMALL and not uses_external_data(tensor):
            graph.initializer.append(tensor)
        elif name not in inputs:
            graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    versioned = {entry.domain for entry in whole.opset_import}
    for domain in (
        {node.domain for one in graphs_of(graph) for node in one.node} - versioned - {"", "ai.onnx"}
    ):
        whole.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    return whole


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Put each node behind those that make its inputs, in place, in inner graphs too; the order stays where
    it may.

    Nodes that wait for each other in a circle stay as they are, at the end.
    """
    for one in list(graphs_of(graph)):
        order = _order(one)
        if order != list(range(len(one.node))):
            nodes = [onnx.NodeProto.FromString(one.node[i].SerializeToString()) for i in order]
            del one.node[:]
            one.node.extend(nodes)


def _order(graph: onnx.GraphProto) -> list[int]:
    makers = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    needed = [
        {makers[name] for name in _read(node) if name in makers} - {i} for i, node in enumerate(graph.node)
    ]
    placed: set[int] = set()
    order: list[int] = []
    for first in range(len(graph.node)):
        stack = [(first, iter(sorted(needed[first])))]
        open_nodes = {first}
        while stack and first not in placed:
            node, sources = stack[-1]
            source = next((one for one in sources if one not in placed and one not in open_nodes), None)
            if source is not None:
                open_nodes.add(source)
                stack.append((source, iter(sorted(needed[source]))))
                continue
            stack.pop()
            placed.add(node)
            order.append(node)
    return order


def _read(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads, and what the graphs inside it do."""
    yield from node.input
    for found in node.attribute:
        for inner in (*found.graphs, *([found.g] if found.HasField("g") else [])):
            for one in graphs_of(inner):
                yield from (name for below in one.node for name in below.input)
                yield from (value.name for value in one.output)


def has_linked_data(model: onnx.ModelProto, path: Path) -> bool:
    """Does data of the model lie in a file beside it that is a symbolic link? path: of the model."""
    return any((path.parent / ExternalDataInfo(tensor).location).is_symlink() for tensor in _outside(model))


def load_linked_data(model: onnx.ModelProto, path: Path) -> None:
    """Read the data that lie beside a model into it, through links as well, which onnx does not follow.

    Args:
        model: read without them; changed in place.
        path: of the model.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is named that is not beside the model, is no plain file, or is too short.
    """
    for tensor in list(_outside(model)):
        info = ExternalDataInfo(tensor)
        location = PurePath(info.location)
        if location.is_absolute() or ".." in location.parts or not location.parts:
            raise ValueError(
                f"the data of {tensor.name} are said to lie in {info.location!r}, not beside the model"
            )
        file = path.parent / location
        if not stat.S_ISREG(file.stat().st_mode):
            raise ValueError(f"{file} is no plain file")
        with file.open("rb") as stream:
            stream.seek(info.offset or 0)
            content = stream.read(info.length) if info.length else stream.read()
        if info.length and len(content) != info.length:
            raise ValueError(f"{file} ends before the data of {tensor.name} do")
        tensor.raw_data = content
        tensor.ClearField("data_location")
        del tensor.external_data[:]


def _outside(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """The tensors whose data lie in another file."""
    for graph in graphs_of(model.graph):
        sparse = [part for one in graph.sparse_initializer for part in (one.values, one.indices)]
        attributes = [found for node in graph.node for found in node.attribute]
        held = [tensor for found in attributes for tensor in (*found.tensors, found.t)]
        yield from (tensor for tensor in (*graph.initializer, *sparse, *held) if uses_external_data(tensor))
