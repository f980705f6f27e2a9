"""NumPy archives: their arrays, of which large ones are mapped, not read.

One that says it holds far more than its bytes are worth is refused before anything is read.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from sparse_export.errors import OutputError
from sparse_export.signature import Array

__all__ = ["header_of", "mapped_copy", "open_arrays", "pieces_of", "require_bounded"]

MAPPED_BYTES = 2**26
"""From this size on an array is mapped."""
PIECE_BYTES = 2**24
"""That are looked at together of a large array."""
_CHUNK = 2**20
_LOCAL_HEADER = 30  # bytes before the name of a member

MOST_BYTES = 2**30
"""That an archive may unpack to whatever its size, beside `MOST_TIMES` of it."""
MOST_TIMES = 100

Shape = tuple[int, ...]


def require_bounded(stream: IO[bytes]) -> None:
    """Check by its directory what an archive unpacks to, and each array by its header.

    Args:
        stream: of a file; read from its start, and put back there. What is no archive passes.

    Raises:
        ValueError: it would unpack to more than a file of its size is worth, or an array is larger than its
            part of the archive.
    """
    if zipfile.is_zipfile(stream):
        with zipfile.ZipFile(stream) as archive:
            parts = archive.infolist()
            size = stream.seek(0, os.SEEK_END)
            whole = sum(part.file_size for part in parts)
            if whole > max(MOST_BYTES, MOST_TIMES * size):
                raise ValueError(
                    f"it unpacks to {whole:,} bytes, and has {size:,}; that is taken for an attack"
                )
            for part in parts:
                if part.filename.endswith(".npy"):
                    with archive.open(part) as member:
                        shape, dtype = header_of(member)
                    if math.prod(shape) * dtype.itemsize > part.file_size:
                        raise ValueError(f"{part.filename} is shorter than its shape {shape} says")
    stream.seek(0)


def header_of(stream: IO[bytes]) -> tuple[Shape, np.dtype[np.generic]]:
    """Read shape and type of one array.

    Args:
        stream: of an .npy file, at its start.

    Raises:
        ValueError: it is no array, or holds objects, which could run code.
    """
    shape, dtype, _ = _whole_header(stream)
    return shape, dtype


def _whole_header(stream: IO[bytes]) -> tuple[Shape, np.dtype[np.generic], bool]:
    """Shape, type, and whether the first axis is the fastest. Raises ValueError."""
    version = np.lib.format.read_magic(stream)
    readers: Mapping[tuple[int, int], Callable[..., tuple[Shape, bool, np.dtype[np.generic]]]] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"an array has the format {version[0]}.{version[1]}, which is not read here")
    shape, in_fortran_order, dtype = readers[version](stream)
    if dtype.hasobject:
        raise ValueError("an array holds Python objects, which are not read")
    return shape, dtype, in_fortran_order


def open_arrays(path: Path) -> dict[str, Array]:
    """Open the arrays of an archive. Small ones are read; large ones are mapped, so that memory holds of them
    what is being looked at.

    A compressed array that is large is unpacked to a temporary file, which ends with the last use of it.
    Every byte is read once, and held to the archive's checksums.

    Args:
        path: of the file.

    Returns:
        The arrays by name.

    Raises:
        OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error: it is no such archive, is
            damaged, or holds Python objects.
    """
    found = {}
    with path.open("rb") as stream:
        require_bounded(stream)
        if not zipfile.is_zipfile(stream):
            stream.seek(0)
            try:
                header_of(stream)
            except ValueError as cause:
                raise ValueError("it is no file of NumPy's") from cause
            return {}  # an array without a name
        with zipfile.ZipFile(stream) as archive:
            for part in archive.infolist():
                if part.filename.endswith(".npy"):
                    found[part.filename.removesuffix(".npy")] = _array(path, archive, part)
    return found


def mapped_copy(shape: Shape, dtype: np.dtype[Any], pieces: Iterable[Array]) -> Array:
    """Write an array in pieces: to memory where it is small, else to a temporary file that is mapped.

    Args:
        shape: of the whole.
        dtype: likewise.
        pieces: along the first axis, in order; each is converted.
    """
    whole: Array
    if math.prod(shape) * dtype.itemsize < MAPPED_BYTES:
        whole = np.empty(shape, dtype)
    else:
        with _scratch(math.prod(shape) * dtype.itemsize) as file:
            whole = np.asarray(np.memmap(file, dtype, "r+", 0, shape))
    start = 0
    for piece in pieces:
        whole[start : start + len(piece)] = piece
        start += len(piece)
    return whole


def pieces_of(array: Array) -> Iterator[Array]:
    """Views of an array along its first axis, each of `PIECE_BYTES` at most where one row is not larger."""
    step = max(1, PIECE_BYTES // max(1, array[:1].nbytes))
    for start in range(0, len(array), step):
        yield array[start : start + step]


def _array(path: Path, archive: zipfile.ZipFile, part: zipfile.ZipInfo) -> Array:
    """One array of an archive."""
    with archive.open(part) as member:
        shape, dtype, in_fortran_order = _whole_header(member)
        start = member.tell()
        if math.prod(shape) * dtype.itemsize < MAPPED_BYTES:
            with archive.open(part) as again:
                read: Array = np.lib.format.read_array(again, allow_pickle=False)
            return read
        order: Literal["C", "F"] = "F" if in_fortran_order else "C"
        if part.compress_type == zipfile.ZIP_STORED:
            while member.read(_CHUNK):  # to the end, where its checksum is looked at
                pass
            offset = _place_of(path, part) + start
            return np.asarray(np.memmap(path, dtype, "c", offset, shape, order))
        with _scratch(math.prod(shape) * dtype.itemsize) as file:
            shutil.copyfileobj(member, file, _CHUNK)
            file.flush()
            return np.asarray(np.memmap(file, dtype, "c", 0, shape, order))


@contextlib.contextmanager
def _scratch(n_bytes: int) -> Iterator[IO[bytes]]:
    """A file without a name, of that size, which a mapping keeps beyond the block.

    Its space is taken at once: a mapping that finds the disk full later ends the process.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.TemporaryFile())
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        except OSError as cause:
            raise OutputError(
                f"{n_bytes:,} bytes for an array cannot be had in the temporary folder "
                f"{tempfile.gettempdir()}: {cause.strerror or cause}.",
                do="Name a folder with more space by TMPDIR, or write the archive uncompressed, by "
                "numpy.savez.",
            ) from cause
        yield file


def _place_of(path: Path, part: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin."""
    with path.open("rb") as stream:
        stream.seek(part.header_offset)
        header = stream.read(_LOCAL_HEADER)
    n_name, n_extra = struct.unpack("<HH", header[26:30])
    return part.header_offset + _LOCAL_HEADER + int(n_name) + int(n_extra)
