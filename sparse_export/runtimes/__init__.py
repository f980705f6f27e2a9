"""One small interface to whatever executes a network: load, run, close."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

import numpy as np

__all__ = ["DeviceSession", "Session"]


class Session(Protocol):
    """A loaded network that owns its memory until `close`; as a context manager it closes itself.

    name: runtime and device, as in `onnxruntime-cpu`.
    """

    @property
    def name(self) -> str: ...

    @property
    def max_batch(self) -> int | None:
        """The most samples that one call takes, None for any number."""
        ...

    def run(self, x: np.ndarray) -> np.ndarray:
        """Logits, float32 (batch, n_classes), for a float32 batch (batch, *input_shape).

        Raises UsageError when the shape or the dtype does not fit the network, ArtefactError when the runtime
        fails at it, MissingCapability when there is too little memory.
        """
        ...

    def close(self) -> None:
        """Give the memory back. A second call does nothing; `run` afterwards raises UsageError."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


@runtime_checkable
class DeviceSession(Protocol):
    """A session whose work on a CUDA device can be launched by itself, to be timed there."""

    def launcher(self, x: np.ndarray) -> Callable[[], object]:
        """A function that launches one pass over a batch, already on the device, and neither copies nor
        waits.

        It goes to the stream of torch that is current when it is called. Raises UsageError as `run` does.
        """
        ...
