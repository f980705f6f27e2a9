"""A graph whose large stored tensors lie beside it as arrays, to be shared, replaced and let go one by one.

A protobuf message frees nothing before all of it goes: a tensor that gets other values keeps the memory of the
old ones (protobuf 7.36.2, upb, 2026-12-01: 305 MB of tensors that were each replaced once held 610 MB).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import uses_external_data
from torch import Tensor

from sparse_export.graph.layers import FLOATS
from sparse_export.graph.protobuf import copy_fields
from sparse_export.graph.shapes import SMALL, n_entries
from sparse_export.graph.stored_tensors import Stored, array_of
from sparse_export.signature import Array

__all__ = ["Parted", "filled", "parted"]

_BESIDE = "beside-the-graph"  # where a tensor says that its values lie


@dataclass(frozen=True, kw_only=True)
class Parted:
    """A graph and the values of its large stored tensors.

    Attributes:
        model: which has types and sizes of these tensors, and no values.
        values: by name. They may be replaced, and are never written into: others may share them.
    """

    model: onnx.ModelProto
    values: dict[str, Array] = field(repr=False)

    def read(self, tensor: Stored) -> Array:
        """The values of a stored tensor.

        Args:
            tensor: of the model.

        Raises:
            ArtefactError: they do not make sense.
        """
        if isinstance(tensor, TensorProto) and uses_external_data(tensor) and tensor.name in self.values:
            return self.values[tensor.name]
        return array_of(tensor)

    def put(self, tensor: TensorProto, array: Array) -> None:
        """Give a stored tensor other values.

        Args:
            tensor: of the model.
            array: of its type and shape, which nobody writes into.
        """
        if tensor.name in self.values:
            self.values[tensor.name] = array
            return
        note = tensor.doc_string
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        if note:
            tensor.doc_string = note

    def copied(self) -> Parted:
        """Another such graph, whose tensors can be given other values. The values are shared."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        return Parted(model=model, values=dict(self.values))

    def whole(self) -> onnx.ModelProto:
        """The graph with its values inside, as another model."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        for tensor in model.graph.initializer:
            if tensor.name in self.values:
                _fill(tensor, self.values[tensor.name])
        return model


def parted(model: onnx.ModelProto | Parted, known: Mapping[str, Tensor] | None = None) -> Parted:
    """Take the values of large stored tensors out of a graph.

    Args:
        model: with its data; not changed. One that is parted already is copied, without its values.
        known: tensors on the CPU that nobody writes into while the result is used. Their memory is shared where
            the graph has the same bits under the same name.
    """
    if isinstance(model, Parted):
        return model.copied()
    bare = onnx.ModelProto()
    copy_fields(model, bare, lambda number: number != onnx.ModelProto.GRAPH_FIELD_NUMBER)
    copy_fields(model.graph, bare.graph, lambda number: number != onnx.GraphProto.INITIALIZER_FIELD_NUMBER)
    values: dict[str, Array] = {}
    for tensor in model.graph.initializer:
        if tensor.data_type not in FLOATS or n_entries(tensor) <= SMALL or uses_external_data(tensor):
            bare.graph.initializer.append(tensor)
            continue
        array = _shared(array_of(tensor), (known or {}).get(tensor.name))
        values[tensor.name] = array
        named = bare.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        named.data_location = TensorProto.EXTERNAL
        named.external_data.add(key="location", value=_BESIDE)
        named.external_data.add(key="length", value=str(array.nbytes))
        if tensor.doc_string:
            named.doc_string = tensor.doc_string
    return Parted(model=bare, values=values)


def filled(tensor: TensorProto, array: Array) -> TensorProto:
    """A stored tensor that only names its values, with these inside; another one is returned as it is.

    Args:
        tensor: of a parted graph.
        array: its values.
    """
    if not uses_external_data(tensor):
        return tensor
    whole = TensorProto()
    whole.CopyFrom(tensor)
    _fill(whole, array)
    return whole


def _fill(tensor: TensorProto, array: Array) -> None:
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    tensor.raw_data = array.tobytes()


def _shared(array: Array, known: Tensor | None) -> Array:
    """The memory of a known tensor where it holds the same bits, else the array."""
    if known is None or not known.is_contiguous() or tuple(known.shape) != array.shape:
        return array
    other: Array = known.detach().numpy()
    alike = other.dtype == array.dtype and np.array_equal(_bytes(other), _bytes(array))
    return other if alike else array


def _bytes(array: Array) -> Array:
    return array.reshape(-1).view(np.uint8)
