"""A model written to disk: as one file, or with its weights in a second one where one cannot hold them.

The weights are written tensor by tensor, each once, at multiples of a page, so that whoever opens the file can map
them. No second copy of the model is made.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from onnx import numpy_helper
from onnx.helper import tensor_dtype_to_np_dtype

from sparse_export.files import write_bytes
from sparse_export.graph.protobuf import BITS, copy_fields, serialized

__all__ = [
    "DATA_SUFFIX",
    "MAX_WEIGHT_BYTES",
    "model_sha256",
    "save_model",
    "tensor_bytes",
    "weight_bytes",
    "without_initializers",
]

MAX_WEIGHT_BYTES = 2**31 - 2**20  # protobuf ends at 2 GiB; a mebibyte is left for the graph itself
DATA_SUFFIX = ".data"

_SMALL_BYTES = 1024  # of a tensor that stays in the file of the graph
_PAGE_BYTES = 4096
_SAID = frozenset(  # fields of a tensor whose data lie elsewhere
    onnx.TensorProto.DESCRIPTOR.fields_by_name[name].number
    for name in ("dims", "data_type", "name", "doc_string", "metadata_props")
)


def save_model(model: onnx.ModelProto, path: str | Path, *, max_bytes: int | None = None) -> tuple[str, ...]:
    """Write a model: as one file, or its weights as a second one where it is too large for one.

    Each file is flushed to disk and takes its name when it is whole, that of the graph last.

    Args:
        model: with its data; not changed.
        path: of the file. That of the weights is called the same with `.data` behind it.
        max_bytes: of weights up to which it is one file; None for `MAX_WEIGHT_BYTES`.

    Returns:
        Names of the files, that of the model first.

    Raises:
        OutputError: a file cannot be written.
    """
    path = Path(path)
    data = path.with_name(f"{path.name}{DATA_SUFFIX}")
    if weight_bytes(model) <= (MAX_WEIGHT_BYTES if max_bytes is None else max_bytes):
        write_bytes(path, serialized(model))
        data.unlink(missing_ok=True)  # of a larger one that stood there
        return (path.name,)
    places: list[tuple[int, int] | None] = []
    write_bytes(data, _data_of(model, places))
    write_bytes(path, serialized(_with_places(model, data.name, places)))
    return path.name, data.name


def weight_bytes(model: onnx.ModelProto) -> int:
    """Count the bytes of the stored tensors, one by one: protobuf does not count beyond its limit.

    Args:
        model: with its data.
    """
    return sum(tensor_bytes(tensor) for tensor in model.graph.initializer)


def model_sha256(model: onnx.ModelProto) -> str:
    """Compute the hex SHA-256 of a model of any size, as if it were one file that `save_model` wrote.

    Args:
        model: with its data.
    """
    digest = hashlib.sha256()
    for part in serialized(model):
        digest.update(part)
    return digest.hexdigest()


def without_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy all of a model but the stored tensors of its main graph, which are not copied on the way.

    Args:
        model: not changed.
    """
    bare = onnx.ModelProto()
    copy_fields(model, bare, lambda number: number != onnx.ModelProto.GRAPH_FIELD_NUMBER)
    copy_fields(model.graph, bare.graph, lambda number: number != onnx.GraphProto.INITIALIZER_FIELD_NUMBER)
    return bare


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Count the bytes that a stored tensor takes in memory.

    Args:
        tensor: with its data.
    """
    if not tensor.HasField("raw_data"):
        return int(tensor.ByteSize())
    kind: Any = tensor.data_type  # onnx's own types take it for another enumeration
    bits = BITS.get(kind) or 8 * tensor_dtype_to_np_dtype(kind).itemsize
    return int(-(-math.prod(tensor.dims) * bits // 8))  # to ask for the bytes would copy them


def _data_of(model: onnx.ModelProto, places: list[tuple[int, int] | None]) -> Iterator[bytes]:
    """What the file of the weights holds. places: gets offset and length of each stored tensor, None where it stays."""
    end = 0
    for tensor in model.graph.initializer:
        stays = tensor.data_type == onnx.TensorProto.STRING or tensor.HasField("data_location")
        content = b"" if stays else _raw(tensor)
        if len(content) <= _SMALL_BYTES:
            places.append(None)
            continue
        gap = -end % _PAGE_BYTES
        places.append((end + gap, len(content)))
        end += gap + len(content)
        yield bytes(gap)
        yield content


def _raw(tensor: onnx.TensorProto) -> bytes:
    """The values of a tensor as a file of data holds them."""
    if not tensor.HasField("raw_data"):
        tensor = numpy_helper.from_array(numpy_helper.to_array(tensor))
    return bytes(tensor.raw_data)


def _with_places(
    model: onnx.ModelProto, location: str, places: list[tuple[int, int] | None]
) -> onnx.ModelProto:
    """A model whose stored tensors say where their data lie. location: name of the file."""
    found = without_initializers(model)
    for tensor, place in zip(model.graph.initializer, places, strict=True):
        if place is None:
            found.graph.initializer.append(tensor)
            continue
        said = found.graph.initializer.add()
        copy_fields(tensor, said, lambda number: number in _SAID)
        said.data_location = onnx.TensorProto.EXTERNAL
        offset, length = place
        for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
            said.external_data.add(key=key, value=value)
    return found
