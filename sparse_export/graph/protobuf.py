"""An ONNX file parsed but for the data of large tensors, and written tensor by tensor.

A parsed model holds a copy of all its weights, beside the bytes that it was parsed from. Here the model is
parsed without them: each large tensor says instead where in the file its data lie, as ONNX has it for data in a
file of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import onnx
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]

__all__ = ["BITS", "copy_fields", "parsed_without_large_data", "serialized", "serialized_tensor"]

_LEAST_BYTES = 2**24  # of a file; smaller ones are parsed whole
_LARGE_BYTES = 2**14  # of a message that is looked into, and of data that stay in the file
_BLOCK_BYTES = 2**16  # read at once
_LONGEST_VARINT = 10  # bytes
_DEEPEST = 60  # messages within messages; protobuf itself reads 100

# Fields of onnx.proto that may hold a large tensor: by message the number of the field, and what it holds.
_RAW_DATA = "raw data"
_FIELDS = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
    "tensor": {9: _RAW_DATA},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # fields of a tensor
_NO_NUMBERS = (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING)
BITS = {  # of the types of which there are several values in a byte
    **dict.fromkeys((onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT4E2M1), 4),
    **dict.fromkeys((onnx.TensorProto.INT2, onnx.TensorProto.UINT2), 2),
}
_VARINT, _EIGHT_BYTES, _COUNTED, _FOUR_BYTES = 0, 1, 2, 5  # how a field is written
_Field = tuple[int, int, int, int]  # number, where it starts, where its content starts, where it ends


class _NotUnderstoodError(Exception):
    """The bytes are no protobuf of the plain kind; whoever parses them whole says what is wrong."""


def parsed_without_large_data(path: Path) -> onnx.ModelProto:
    """Parse an ONNX file but for the data of large tensors, which then name the file itself as their place.

    Args:
        path: of the file. A small one is parsed whole.

    Returns:
        The model. Data that lie in other files are not read.

    Raises:
        OSError: the file cannot be read.
        ValueError, DecodeError: it is no ONNX model.
    """
    if path.stat().st_size >= _LEAST_BYTES:
        try:
            entries = onnx.StringStringEntryProto(key="location", value=path.name).SerializeToString()
            with path.open("rb") as stream:
                bare = _without_large(_Content(stream), 0, path.stat().st_size, "model", entries, 0)
        except (_NotUnderstoodError, DecodeError, KeyError, ValueError):  # ValueError: its name is no text
            pass
        else:
            return onnx.load_from_string(bare)
    # By default a suffix decides, also for onnx's forms of text.
    return onnx.load(path, format="protobuf", load_external_data=False)


def serialized(model: onnx.ModelProto) -> Iterator[bytes]:
    """Serialize a model part by part, so that its weights are not all there once more.

    Args:
        model: not changed meanwhile.

    Yields:
        The parts of `model.SerializeToString(deterministic=True)`, a stored tensor at a time.
    """
    whole, graph = onnx.ModelProto.GRAPH_FIELD_NUMBER, onnx.GraphProto.INITIALIZER_FIELD_NUMBER
    tensors = model.graph.initializer
    sizes = [_tensor_size(tensor) for tensor in tensors]
    tag = _varint(graph << 3 | _COUNTED)
    first, last = _around(model.graph, onnx.GraphProto, graph)
    n_bytes = len(first) + len(last) + sum(len(tag) + len(_varint(size)) + size for size in sizes)
    before, behind = _around(model, onnx.ModelProto, whole)
    yield before
    if model.HasField("graph"):
        yield _varint(whole << 3 | _COUNTED) + _varint(n_bytes) + first
        for tensor, size in zip(tensors, sizes, strict=True):
            yield tag + _varint(size)
            yield from serialized_tensor(tensor)
        yield last
    yield behind


def serialized_tensor(tensor: onnx.TensorProto) -> Iterator[bytes]:
    """Serialize a tensor of any size: protobuf ends at 2 GiB.

    Args:
        tensor: not changed meanwhile.

    Yields:
        The parts of `tensor.SerializeToString(deterministic=True)`.
    """
    if not tensor.HasField("raw_data"):
        yield tensor.SerializeToString(deterministic=True)
        return
    before, behind = _around(tensor, onnx.TensorProto, onnx.TensorProto.RAW_DATA_FIELD_NUMBER)
    content = tensor.raw_data
    yield before + _varint(onnx.TensorProto.RAW_DATA_FIELD_NUMBER << 3 | _COUNTED) + _varint(len(content))
    yield content
    yield behind


def _tensor_size(tensor: onnx.TensorProto) -> int:
    """Bytes of a serialized tensor."""
    return sum(map(len, serialized_tensor(tensor)))


def _around(message: Any, kind: type[Any], number: int) -> tuple[bytes, bytes]:
    """The fields of a message before one of them, and those behind it."""
    before, behind = kind(), kind()
    copy_fields(message, before, lambda other: other < number)
    copy_fields(message, behind, lambda other: other > number)
    return tuple(part.SerializeToString(deterministic=True) for part in (before, behind))


def copy_fields(source: Any, target: Any, wanted: Callable[[int], bool]) -> None:
    """Copy some fields of a message into another.

    Args:
        source: a protobuf message.
        target: one of the same kind, without these fields; changed in place.
        wanted: whether a field is copied, by its number.
    """
    for field in source.DESCRIPTOR.fields:
        if not wanted(field.number):
            continue  # what is not wanted is not looked at either: bytes would be copied
        value = getattr(source, field.name)
        if not isinstance(value, Message | str | bytes | int | float):
            getattr(target, field.name).extend(value)
        elif source.HasField(field.name):
            if isinstance(value, Message):
                getattr(target, field.name).CopyFrom(value)
            else:
                setattr(target, field.name, value)


class _Content:
    """The bytes of an open file by their places, read in blocks; what was mapped would count as memory."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._start, self._block = 0, b""

    def part(self, start: int, end: int) -> bytes:
        """The bytes of a range that lies in the file."""
        first = start - self._start
        if first < 0 or end > self._start + len(self._block):
            self._stream.seek(start)
            if end - start > _BLOCK_BYTES:
                return self._stream.read(end - start)
            self._start, self._block, first = start, self._stream.read(_BLOCK_BYTES), 0
        return self._block[first : first + end - start]


def _without_large(
    content: _Content, start: int, end: int, message: str, location: bytes, depth: int
) -> bytes:
    """What stands in part of a file, with places instead of large data. location: entry of a tensor."""
    fields = list(_fields(content, start, end))
    inside = {} if message == "tensor" and not _may_stay(content, fields) else _FIELDS[message]
    parts: list[bytes] = []
    copied = start
    for number, field_start, body, field_end in fields:
        below = inside.get(number)
        if below is None or field_end - body < _LARGE_BYTES or depth > _DEEPEST:
            continue
        parts.append(content.part(copied, field_start))
        copied = field_end
        if below == _RAW_DATA:
            parts.append(_place(location, body, field_end - body))
        else:
            inner = _without_large(content, body, field_end, below, location, depth + 1)
            parts += [_varint(number << 3 | _COUNTED), _varint(len(inner)), inner]
    return b"".join([*parts, content.part(copied, end)])


def _may_stay(content: _Content, fields: list[_Field]) -> bool:
    """Are the data of a tensor raw, here, and of the size that it says? All else is for the checker to see."""
    raw = [field_end - body for number, _, body, field_end in fields if number in _FIELDS["tensor"]]
    others = (content.part(begin, end) for number, begin, _, end in fields if number not in _FIELDS["tensor"])
    tensor = onnx.TensorProto.FromString(b"".join(others))
    known = {"dims", "data_type", "name", "doc_string", "metadata_props"}
    if len(raw) != 1 or any(field.name not in known for field, _ in tensor.ListFields()):
        return False
    if any(size < 0 for size in tensor.dims) or tensor.data_type in _NO_NUMBERS:
        return False
    bits = BITS.get(tensor.data_type)
    if bits is None:
        bits = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return bool(raw[0] == -(-math.prod(tensor.dims) * bits // 8))


def _place(location: bytes, offset: int, length: int) -> bytes:
    """The fields of a tensor that say where its data lie."""
    entries = [location]
    for key, value in (("offset", offset), ("length", length)):
        entries.append(onnx.StringStringEntryProto(key=key, value=str(value)).SerializeToString())
    tag = _varint(_EXTERNAL_DATA << 3 | _COUNTED)
    written = b"".join(tag + _varint(len(entry)) + entry for entry in entries)
    return written + _varint(_DATA_LOCATION << 3 | _VARINT) + _varint(onnx.TensorProto.EXTERNAL)


def _fields(content: _Content, start: int, end: int) -> Iterator[_Field]:
    """The fields of a message, in order."""
    at = start
    while at < end:
        field_start = at
        tag, at = _read_varint(content, at, end)
        number, kind = tag >> 3, tag & 7
        body = at
        if kind == _COUNTED:
            length, body = _read_varint(content, at, end)
            at = body + length
        elif kind == _VARINT:
            _, at = _read_varint(content, at, end)
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            at += 8 if kind == _EIGHT_BYTES else 4
        else:
            raise _NotUnderstoodError
        if at > end or not number:
            raise _NotUnderstoodError
        yield number, field_start, body, at


def _read_varint(content: _Content, at: int, end: int) -> tuple[int, int]:
    value = 0
    for count, byte in enumerate(content.part(at, min(at + _LONGEST_VARINT, end))):
        value |= (byte & 127) << 7 * count
        if byte < 128:
            return value, at + count + 1
    raise _NotUnderstoodError


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)
