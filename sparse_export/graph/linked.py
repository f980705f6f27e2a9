"""Where the data of a tensor lie that a model does not hold itself."""

from __future__ import annotations

import stat
from pathlib import Path, PurePath

import onnx
from onnx.external_data_helper import ExternalDataInfo

__all__ = ["place_of"]


def place_of(tensor: onnx.TensorProto, path: Path, *, links: bool) -> tuple[Path, int, int]:
    """Find the data of a tensor in the file that it names.

    Args:
        tensor: that says where its data lie.
        path: of the model. A tensor may name this file itself.
        links: follow symbolic links to files beside it, rather than refuse them.

    Returns:
        The file, and offset and length of the data in bytes; the file has them all.

    Raises:
        OSError: there is no such file.
        ValueError: a file is named that is not beside the model, is no plain file, or is too short.
    """
    info = ExternalDataInfo(tensor)
    location = PurePath(info.location)
    if location.is_absolute() or ".." in location.parts or not location.parts:
        raise ValueError(
            f"the data of {tensor.name} are said to lie in {info.location!r}, not beside the model"
        )
    file = path.parent / location
    if file != path and file.is_symlink() and not links:
        raise ValueError(f"{file} is a symbolic link, which is not followed in a bundle")
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{file} is no plain file")
    offset = info.offset or 0
    length = info.length or max(found.st_size - offset, 0)
    if offset + length > found.st_size or offset < 0 or length < 0:
        raise ValueError(f"{file} ends before the data of {tensor.name} do")
    return file, offset, length
