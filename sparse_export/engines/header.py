"""Reads the header of an engine without any library: loading an engine would run its code."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sparse_export.errors import ArtefactError, UsageError

__all__ = ["HEADER_BYTES", "EngineHeader", "read_header", "require_whole"]

HEADER_BYTES = 64  # TensorRT for RTX 1.7: Runtime.engine_header_size
# As TensorRT for RTX 1.7.1 writes it: magic, then at 16 the length of the whole file, at 24 the four numbers
# of the version. TensorRT's own headers are reported as unknown: none was at hand to look at.
_RTX_MAGIC = b"vtrt"
_LENGTH_AT = 16
_VERSION_AT = 24


@dataclass(frozen=True, kw_only=True)
class EngineHeader:
    """The header of an engine file.

    Attributes:
        target: None for a file in no known form, as are the next two.
        version: of the library that wrote it.
        stated_bytes: size of the file by its header.
        size_bytes: size of the file.
    """

    target: Literal["tensorrt-rtx"] | None
    version: str | None
    stated_bytes: int | None
    size_bytes: int


def read_header(path: Path) -> EngineHeader:
    """Read the header of a file.

    Args:
        path: an engine, or any other file.

    Raises:
        UsageError: there is no file.
        ArtefactError: it cannot be read.
    """
    if not path.is_file():
        raise UsageError(f"{path} is not a file.", do="Give the path of an engine.")
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(HEADER_BYTES)
    except OSError as cause:
        raise ArtefactError(
            f"The engine {path} cannot be read: {cause.strerror or cause}.", do="Look at its permissions."
        ) from cause
    if len(head) < HEADER_BYTES or not head.startswith(_RTX_MAGIC):
        return EngineHeader(target=None, version=None, stated_bytes=None, size_bytes=size)
    (stated,) = struct.unpack_from("<Q", head, _LENGTH_AT)
    version = ".".join(map(str, head[_VERSION_AT : _VERSION_AT + 4]))
    return EngineHeader(target="tensorrt-rtx", version=version, stated_bytes=stated, size_bytes=size)


def require_whole(path: Path, header: EngineHeader) -> None:
    """Check that an engine file is as long as its header says.

    Args:
        path: for the message.
        header: of that file.

    Raises:
        ArtefactError: the file is empty, or shorter or longer.
    """
    if header.size_bytes == 0:
        raise ArtefactError(f"The engine {path} is empty.", do="Build it again.")
    if header.stated_bytes is not None and header.stated_bytes != header.size_bytes:
        raise ArtefactError(
            f"{path} has {header.size_bytes} bytes, and {header.stated_bytes} by its header: "
            "it is truncated or was changed.",
            do="Copy it again, or build it again.",
        )
