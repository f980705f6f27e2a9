"""What the session classes of all runtimes share: one life, and the check of what they are run on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Self, final

import numpy as np

from sparse_export.errors import UsageError

__all__ = ["BaseSession"]


class BaseSession(ABC):
    """A session of a runtime: open from its making to `close`, for batches of one type and shape.

    A subclass loads the network in its `__init__`, runs it in `_run` and gives its memory back in `_free`.

    Args:
        name: runtime and device, as in `onnxruntime-cpu`.
        dtype: of the inputs.
        shape: of the inputs, the batch included; a size that is no integer is free. None where any shape is
            tried.
    """

    def __init__(
        self, name: str, dtype: np.dtype[Any] | type, shape: tuple[int | str | None, ...] | None = None
    ) -> None:
        self.name = name
        self._dtype = np.dtype(dtype)
        self._shape = shape
        self._is_open = True

    @property
    def max_batch(self) -> int | None:
        """The most samples that one call takes, None for any number."""
        return None

    @final
    def run(self, x: np.ndarray) -> np.ndarray:
        """As `sparse_export.runtimes.Session.run`."""
        self._require_open()
        self._require_fitting(x)
        return self._run(x)

    @abstractmethod
    def _run(self, x: np.ndarray) -> np.ndarray:
        """Run a batch that fits, while open."""

    @abstractmethod
    def _free(self) -> None:
        """Give the memory back; called once."""

    def _require_open(self) -> None:
        if not self._is_open:
            raise UsageError(
                "This session is closed.", expected="An open one was expected.", do="Open the network again."
            )

    def _require_fitting(self, x: np.ndarray) -> None:
        if x.dtype == self._dtype and self._fits(x.shape):
            return
        wanted = "" if self._shape is None else f" of shape {self._described(self._shape)}"
        raise UsageError(
            f"The input is {x.dtype} of shape {x.shape}.",
            expected=f"{self._dtype}{wanted} was expected.",
            do="Cast or reshape it; the first axis is the batch.",
        )

    def _fits(self, shape: tuple[int, ...]) -> bool:
        if self._shape is None:
            return True
        return len(shape) == len(self._shape) and all(
            not isinstance(wanted, int) or wanted == found
            for wanted, found in zip(self._shape, shape, strict=True)
        )

    @staticmethod
    def _described(shape: tuple[int | str | None, ...]) -> str:
        return f"({', '.join(str(n) if isinstance(n, int) else 'any' for n in shape)})"

    @final
    def close(self) -> None:
        """Give the memory back. A second call does nothing; `run` afterwards raises UsageError."""
        if self._is_open:
            self._is_open = False
            self._free()

    @final
    def __enter__(self) -> Self:
        return self

    @final
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
