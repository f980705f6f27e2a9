"""An ONNX file read with dense weights, whether it is packed or not."""

from __future__ import annotations

from pathlib import Path

import onnx

from sparse_export.errors import ArtefactError
from sparse_export.graph.foreign import onnx_from_file
from sparse_export.graph.passes.expand24 import expand_in_place
from sparse_export.graph.passes.format24 import DOMAIN

__all__ = ["dense_from_file", "may_be_packed", "names_packing"]


def dense_from_file(path: str | Path) -> onnx.ModelProto:
    """Read an ONNX model with its external data, packed or not, with dense weights.

    Only the packing is checked: onnx's checker takes longer than all the rest.

    Args:
        path: of the file.

    Returns:
        The model with dense weights.

    Raises:
        UsageError: there is no such file.
        ArtefactError: it is no ONNX model, or as of `expand`.
    """
    model = onnx_from_file(path)
    try:
        expand_in_place(model)
    except ArtefactError as cause:
        raise ArtefactError(f"{path}: {cause.what}", expected=cause.expected, do=cause.do) from cause
    return model


def may_be_packed(path: Path) -> bool:
    """Does the name of the format occur in a file?

    It spares parsing most files that are not packed.

    Args:
        path: of the file.

    Returns:
        False where the file is certainly not packed.
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
    """Does the name of the format occur in the content of an ONNX file?

    Args:
        content: of the file.

    Returns:
        False where it is certainly not packed.
    """
    return DOMAIN.encode() in content
