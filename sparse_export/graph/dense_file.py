"""An ONNX file read with dense weights, whether it is packed or not."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from sparse_export.errors import ArtefactError
from sparse_export.graph.foreign import onnx_from_file
from sparse_export.graph.passes.expand24 import expand_in_place
from sparse_export.graph.passes.format24 import DOMAIN

__all__ = ["dense_from_bytes", "dense_from_file", "may_be_packed", "names_packing"]


def dense_from_file(path: str | Path) -> onnx.ModelProto:
    """Read an ONNX model with its external data, packed or not, with dense weights.

    Only the packing is checked: onnx's checker takes longer than all the rest. Raises UsageError when there
    is no such file, ArtefactError when it is no ONNX model or as `expand` does.
    """
    return _dense(onnx_from_file(path), path)


def dense_from_bytes(content: bytes, path: str | Path) -> onnx.ModelProto:
    """As `dense_from_file`, of what a file held that was read already. path: of the file, for errors."""
    try:
        model = onnx.load_from_string(content)
    except DecodeError as cause:
        raise ArtefactError(f"{path} cannot be read as ONNX: {cause}.", do="Build it again.") from cause
    return _dense(model, path)


def _dense(model: onnx.ModelProto, path: str | Path) -> onnx.ModelProto:
    """The model, expanded in place."""
    try:
        expand_in_place(model)
    except ArtefactError as cause:
        raise ArtefactError(f"{path}: {cause.what}", expected=cause.expected, do=cause.do) from cause
    return model


def may_be_packed(path: Path) -> bool:
    """Does the file name the format at all?

    A cheap look that spares parsing most files that are not packed.
    """
    needle = DOMAIN.encode()
    tail = b""
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            if needle in tail + block:
                return True
            tail = block[-len(needle) :]
    return False


def names_packing(content: bytes) -> bool:
    """Does what an ONNX file holds name the format at all?"""
    return DOMAIN.encode() in content
