"""The values of a graph that later parts of a walk still read, in memory up to a limit and on disk beyond."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sparse_export.errors import OutputError
from sparse_export.signature import Array

__all__ = ["LiveValues", "Value"]

Value = Array | list[Array]
"""A tensor, or a sequence of tensors, as onnxruntime gives and takes them."""


class LiveValues:
    """Values by name and batch.

    What is read last goes to disk first. Texts and sequences stay in memory.
    """

    def __init__(self, limit_bytes: int, folder: Path, next_read: Callable[[str], int]) -> None:
        """Start with none.

        Args:
            limit_bytes: of the values in memory.
            folder: an existing one for the others; it is the owner's to remove.
            next_read: when a value is read, as a number that grows with time.
        """
        self._limit, self._folder, self._next_read = limit_bytes, folder, next_read
        self._held: dict[str, dict[int, Value]] = {}
        self._spilled: dict[tuple[str, int], tuple[Path, np.dtype[Any], tuple[int, ...]]] = {}
        self._n_bytes = 0
        self._n_files = 0
        self.most_bytes = 0
        self.spilled_bytes = 0

    def put(self, name: str, batch: int, value: Value) -> None:
        """Keep a value.

        Raises:
            OutputError: it does not fit into memory, and cannot be written.
        """
        self._held.setdefault(name, {})[batch] = value
        self._n_bytes += _n_bytes(value)
        while self._n_bytes > self._limit and (victim := self._last_read()) is not None:
            self._spill(*victim)
        self.most_bytes = max(self.most_bytes, self._n_bytes)

    def get(self, name: str, batch: int) -> Value:
        """A value that was put and not dropped."""
        if batch in self._held.get(name, ()):
            return self._held[name][batch]
        path, dtype, shape = self._spilled[name, batch]
        # Raw bytes: NumPy's own format does not know bfloat16.
        return np.fromfile(path, dtype=np.uint8).view(dtype).reshape(shape)

    def shape(self, name: str, batch: int) -> tuple[int, ...]:
        """The shape of a tensor that was put and not dropped."""
        if (name, batch) in self._spilled:
            return self._spilled[name, batch][2]
        value = self._held[name][batch]
        assert not isinstance(value, list), "a sequence has no shape"
        return value.shape

    def drop(self, name: str, batch: int) -> None:
        """Forget a value; one that is not there is none to forget."""
        held = self._held.get(name, {})
        if batch in held:
            self._n_bytes -= _n_bytes(held.pop(batch))
        elif (name, batch) in self._spilled:
            self._spilled.pop((name, batch))[0].unlink()

    def _last_read(self) -> tuple[str, int] | None:
        names = [
            name for name, held in self._held.items() if any(map(_can_be_written, held.values())) and held
        ]
        if not names:
            return None
        name = max(names, key=self._next_read)
        # Batches are read in their order.
        return name, max(i for i, value in self._held[name].items() if _can_be_written(value))

    def _spill(self, name: str, batch: int) -> None:
        value = self._held[name].pop(batch)
        assert not isinstance(value, list)
        self._n_files += 1
        path = self._folder / f"{self._n_files}.bin"
        try:
            np.ascontiguousarray(value).reshape(-1).view(np.uint8).tofile(path)
        except OSError as cause:
            raise OutputError(
                f"Values that later layers read cannot be written to {path}: {cause.strerror or cause}.",
                do="Make room there or set TMPDIR to another place, allow more memory, or calibrate on fewer "
                "samples.",
            ) from cause
        self._spilled[name, batch] = path, value.dtype, value.shape
        self._n_bytes -= value.nbytes
        self.spilled_bytes += value.nbytes


def _n_bytes(value: Value) -> int:
    return sum(one.nbytes for one in value) if isinstance(value, list) else value.nbytes


def _can_be_written(value: Value) -> bool:
    return not isinstance(value, list) and not value.dtype.hasobject
