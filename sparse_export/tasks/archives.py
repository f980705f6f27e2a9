"""NumPy archives that say they hold far more than their bytes are worth, refused before anything is read."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable, Mapping
from typing import IO

import numpy as np

__all__ = ["header_of", "require_bounded"]

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
    version = np.lib.format.read_magic(stream)
    readers: Mapping[tuple[int, int], Callable[..., tuple[Shape, bool, np.dtype[np.generic]]]] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"an array has the format {version[0]}.{version[1]}, which is not read here")
    shape, _fortran, dtype = readers[version](stream)
    if dtype.hasobject:
        raise ValueError("an array holds Python objects, which are not read")
    return shape, dtype
