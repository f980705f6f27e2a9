"""The data of a model that was opened without them, mapped one tensor at a time."""

from __future__ import annotations

import math
import mmap
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx.external_data_helper import uses_external_data

from sparse_export.graph.foreign import readable
from sparse_export.graph.linked import place_of
from sparse_export.graph.stored_tensors import Stored, array_of
from sparse_export.signature import Array

__all__ = ["MappedData"]

_PACKED_OR_NO_NUMBERS = frozenset(
    (
        *("UNDEFINED", "STRING"),
        *("INT2", "UINT2", "INT4", "UINT4", "FLOAT4E2M1"),  # several in a byte
    )
)


class MappedData:
    """The data of the tensors of one model, mapped when they are asked for.

    Of the tensor before, no page is kept in memory, though its array stays valid: the file has them.

    Args:
        path: of the model.
        links: follow symbolic links to the files that hold its data, rather than refuse them.
    """

    def __init__(self, path: Path, *, links: bool) -> None:
        self._path, self._links = path, links
        self._file: Path | None = None
        self._content: mmap.mmap | None = None
        self._seen: tuple[int, int] | None = None  # offset and length

    def __call__(self, tensor: Stored) -> Array:
        """The values of a stored tensor, read-only where they are mapped.

        Args:
            tensor: of the model.

        Raises:
            ArtefactError: they do not make sense, or the file of the data cannot be read.
        """
        if isinstance(tensor, onnx.SparseTensorProto) or not uses_external_data(tensor):
            return array_of(tensor)
        with readable(self._path):
            file, offset, length = place_of(tensor, self._path, links=self._links)
            content = self._mapped(file)
        self._let_go()
        self._seen = offset, length
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        if kind not in _PACKED_OR_NO_NUMBERS:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            n_entries = math.prod(tensor.dims)
            if n_entries * dtype.itemsize == length and sys.byteorder == "little":
                return np.frombuffer(content, dtype, n_entries, offset).reshape(tensor.dims)
        whole = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        whole.raw_data = content[offset : offset + length]
        return array_of(whole)

    def _mapped(self, file: Path) -> mmap.mmap:
        if file != self._file or self._content is None:
            with file.open("rb") as stream:
                self._content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            self._file, self._seen = file, None
        return self._content

    def _let_go(self) -> None:
        if self._seen is not None and self._content is not None and hasattr(mmap, "MADV_DONTNEED"):
            offset, length = self._seen
            start = offset // mmap.PAGESIZE * mmap.PAGESIZE
            self._content.madvise(mmap.MADV_DONTNEED, start, offset + length - start)
