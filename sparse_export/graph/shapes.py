"""Types and shapes of the values of a graph, as onnx infers them; data propagation is never used."""

from __future__ import annotations

import re
from collections.abc import Iterator

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from sparse_export.graph.names import graphs_of
from sparse_export.graph.protobuf import copy_fields

__all__ = ["infer_shapes", "tensor_types", "with_weights_as_inputs", "without_weights"]

SMALL: int = 1024
"""Entries of a stored tensor that inference is given whole, since it may be a shape."""


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model but for the data of its large initializers, whose shapes are kept.

    Args:
        model: not changed. Its functions come along.

    Returns:
        A model with the same values. It holds no `value_info`.
    """
    bare = onnx.ModelProto(ir_version=model.ir_version)
    bare.opset_import.extend(model.opset_import)
    bare.functions.extend(model.functions)
    bare.graph.name = model.graph.name
    bare.graph.node.extend(model.graph.node)
    bare.graph.input.extend(model.graph.input)
    bare.graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if n_entries(tensor) <= SMALL:
            bare.graph.initializer.append(tensor)
        else:
            bare.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    for sparse in model.graph.sparse_initializer:
        values = sparse.values
        bare.graph.initializer.add(name=values.name, data_type=values.data_type, dims=sparse.dims)
    return bare


def with_weights_as_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model with all that it says, but for large initializers, which become inputs of the same shape.

    It is for onnx's checker, which would copy the weights several times.

    Args:
        model: of an IR version that lets weights be no inputs; not changed.
    """
    bare = onnx.ModelProto()
    copy_fields(model, bare, lambda number: number != onnx.ModelProto.GRAPH_FIELD_NUMBER)
    copy_fields(model.graph, bare.graph, lambda number: number != onnx.GraphProto.INITIALIZER_FIELD_NUMBER)
    inputs = {value.name for value in bare.graph.input}
    for tensor in model.graph.initializer:
        if n_entries(tensor) <= SMALL:
            bare.graph.initializer.append(tensor)
        elif tensor.name not in inputs:
            bare.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    return bare


def n_entries(tensor: onnx.TensorProto) -> int:
    """Count the entries of a stored tensor by its sizes."""
    count = 1
    for size in tensor.dims:
        count *= size
    return count


def infer_shapes(model: onnx.ModelProto) -> str | None:
    """Write types and shapes into a model: of its values into `value_info`, of its outputs where they lack.

    What the file says of its values stays where it agrees with what follows from the inputs. Where it
    contradicts, all of it is dropped and inferred anew.

    Args:
        model: changed in place. Sizes that are not positive are taken as free.

    Returns:
        Why shapes are missing or were dropped, None where nothing is wrong.
    """
    bare = without_weights(model)
    del bare.functions[:]  # inference would go into every call, of calls, of calls
    bare.graph.value_info.extend(model.graph.value_info)
    problem = None
    try:
        found = onnx.shape_inference.infer_shapes(bare, strict_mode=True)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError, DecodeError) as cause:
        problem = " ".join(str(cause).split()) or type(cause).__name__
        for graph in graphs_of(bare.graph):
            del graph.value_info[:]
        for value in bare.graph.output:
            value.type.tensor_type.ClearField("shape")
        try:
            found = onnx.shape_inference.infer_shapes(bare)
        except (onnx.shape_inference.InferenceError, ValueError, RuntimeError, DecodeError):
            return problem
    _drop_made_up_names(found.graph, model.graph)
    del model.graph.value_info[:]
    model.graph.value_info.extend(found.graph.value_info)
    for old, new in zip(model.graph.output, found.graph.output, strict=True):
        if new.HasField("type") and (old.type.WhichOneof("value") in (None, "tensor_type")):
            old.type.CopyFrom(new.type)
    for node, known in zip(model.graph.node, found.graph.node, strict=True):
        if any(field.HasField("g") or field.graphs for field in node.attribute):
            node.CopyFrom(known)
    return problem


def _dims(graph: onnx.GraphProto) -> Iterator[onnx.TensorShapeProto.Dimension]:
    for one in graphs_of(graph):
        for value in (*one.input, *one.output, *one.value_info):
            yield from value.type.tensor_type.shape.dim


def _drop_made_up_names(graph: onnx.GraphProto, before: onnx.GraphProto) -> None:
    """Take away the names that onnx gave sizes of which it knows nothing, in place.

    before: the graph without what onnx found, whose names stay.
    """
    made_up = [dim for dim in _dims(graph) if re.fullmatch(r"unk__\d+", dim.dim_param)]
    kept = {dim.dim_param for dim in _dims(before)} if made_up else set()
    for dim in made_up:
        if dim.dim_param not in kept:
            dim.Clear()


def tensor_types(graph: onnx.GraphProto) -> dict[str, onnx.TypeProto.Tensor]:
    """Look up what is known of the values of a graph, stored tensors included.

    Args:
        graph: with `value_info`; graphs inside it are left out.
    """
    found = {
        value.name: value.type.tensor_type
        for value in (*graph.value_info, *graph.output, *graph.input)
        if value.type.HasField("tensor_type")
    }
    for tensor in graph.initializer:
        stored = onnx.TypeProto.Tensor(elem_type=tensor.data_type)
        stored.shape.SetInParent()
        for size in tensor.dims:
            stored.shape.dim.add(dim_value=size)
        found[tensor.name] = stored
    return found
