"""One small interface to whatever executes a network: load, run, close."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self, overload, runtime_checkable

from sparse_export.signature import Array, Feeds, Signature

__all__ = ["DeviceSession", "Session"]


class Session(Protocol):
    """A loaded network that owns its memory until `close`; as a context manager it closes itself.

    name: runtime and device, as in `onnxruntime-cpu`.  signature: what the network takes and gives.
    """

    @property
    def name(self) -> str: ...

    @property
    def signature(self) -> Signature: ...

    @property
    def max_batch(self) -> int | None:
        """The most samples that one call takes, None for any number."""
        ...

    @overload
    def run(self, inputs: Feeds, /) -> dict[str, Array]: ...
    @overload
    def run(self, inputs: Array, /) -> Array: ...
    def run(self, inputs: Feeds | Array, /) -> dict[str, Array] | Array:
        """The outputs by name, for the inputs by name; the one output alone, for the one input alone.

        Raises UsageError when names, types or shapes do not fit the network, ArtefactError when the runtime
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

    def launcher(self, feeds: Feeds) -> Callable[[], object]:
        """A function that launches one pass over the inputs, already on the device, and neither copies nor
        waits.

        It goes to the stream of torch that is current when it is called. Raises UsageError as `run` does.
        """
        ...
