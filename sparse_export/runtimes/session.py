"""What the session classes of all runtimes share: one life, and the check of what they are run on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType
from typing import Self, final, overload

from sparse_export.errors import UsageError
from sparse_export.signature import Array, Feeds, Signature

__all__ = ["BaseSession", "only_array"]


class BaseSession(ABC):
    """A session of a runtime: open from its making to `close`.

    A subclass loads the network in its `__init__`, runs it in `_run` and gives its memory back in `_free`.

    Args:
        name: runtime and device, as in `onnxruntime-cpu`.
        signature: what the network takes and gives.
    """

    def __init__(self, name: str, signature: Signature) -> None:
        self.name = name
        self.signature = signature
        self._is_open = True

    @property
    def max_batch(self) -> int | None:
        """The most samples that one call takes, None for any number."""
        return None

    @overload
    def run(self, inputs: Feeds, /) -> dict[str, Array]: ...
    @overload
    def run(self, inputs: Array, /) -> Array: ...
    @final
    def run(self, inputs: Feeds | Array, /) -> dict[str, Array] | Array:
        """As `sparse_export.runtimes.Session.run`."""
        self._require_open()
        if isinstance(inputs, Mapping):
            self.signature.require_feeds(inputs)
            return self._run(inputs)
        return only_array(self.run({self._only_input: inputs}), self.name)

    @abstractmethod
    def _run(self, feeds: Feeds) -> dict[str, Array]:
        """Run inputs that fit, while open."""

    @abstractmethod
    def _free(self) -> None:
        """Give the memory back; called once."""

    @property
    def _only_input(self) -> str:
        if len(self.signature.inputs) != 1:
            raise UsageError(
                "One array was given.",
                expected=f"The network takes {', '.join(map(str, self.signature.inputs))}.",
                do="Give a mapping of arrays by these names.",
            )
        return self.signature.inputs[0].name

    def _require_open(self) -> None:
        if not self._is_open:
            raise UsageError(
                "This session is closed.", expected="An open one was expected.", do="Open the network again."
            )

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


def only_array(outputs: Mapping[str, Array], who: str) -> Array:
    """Take the one output of a network.

    Args:
        outputs: by name.
        who: gave them, for the message.

    Raises:
        UsageError: there are several.
    """
    if len(outputs) != 1:
        raise UsageError(
            f"{who} gives several outputs: {', '.join(outputs)}.",
            do="Give the inputs as a mapping of arrays by name, and the outputs come as one.",
        )
    return next(iter(outputs.values()))
