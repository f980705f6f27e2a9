"""Runs a torch network behind the interface of all runtimes, on the CPU."""

from __future__ import annotations

from torch import nn

from sparse_export.errors import UsageError
from sparse_export.graph.call_record import example_of_signature
from sparse_export.graph.example import Example
from sparse_export.graph.named_network import NamedNetwork, run_module
from sparse_export.runtimes.session import BaseSession
from sparse_export.signature import Array, Feeds, Signature

__all__ = ["TorchSession"]


class TorchSession(BaseSession):
    """A network in evaluation mode. It stays the caller's.

    Args:
        network: on the CPU.
        signature: of the network.
        example: how it is called; None for its inputs in order where there is one, else by the names that
            forward has.
    """

    def __init__(self, network: nn.Module, signature: Signature, example: Example | None = None) -> None:
        super().__init__("torch-cpu", signature)
        self._network = network
        self._example = example or example_of_signature(network, signature)
        self._named: NamedNetwork | None = None

    @property
    def named(self) -> NamedNetwork | None:
        """The network by its named tensors; None before it ran."""
        return self._named

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        """Raises UsageError where the network does not take the inputs, or gives others than it should."""
        shapes = ", ".join(str(array.shape) for array in feeds.values())
        name = type(self._network).__name__
        try:
            if self._named is None:
                self._named = NamedNetwork(self._network, self._example)
            found = run_module(self._named, feeds)
        except Exception as cause:  # whatever forward raises
            raise UsageError(
                f"The network {name} does not take inputs {shapes}: {str(cause) or type(cause).__name__}.",
                expected=f"It was expected to take {', '.join(map(str, self.signature.inputs))}.",
                do="Remove from forward what depends on the batch size, if it takes others.",
            ) from cause
        if len(self.signature.outputs) == len(found) == 1:  # whatever a run calls its only output
            found = {self.signature.outputs[0].name: next(iter(found.values()))}
        sizes = self.signature.sizes_in(feeds)
        for one in self.signature.outputs:
            array = found.get(one.name)
            fits = (
                array is not None
                and array.ndim == len(one.shape)
                and all(
                    have == (want if isinstance(want, int) else sizes.get(want, have))
                    for have, want in zip(array.shape, one.shape, strict=True)
                )
            )
            if not fits:
                got = "no such output" if array is None else f"{array.shape}"
                raise UsageError(
                    f"The network {name} returns {got} for inputs {shapes}.",
                    expected=f"{one} was expected.",
                    do="Wrap it in a module that returns what its signature says.",
                )
        return {one.name: found[one.name] for one in self.signature.outputs}

    def _free(self) -> None:
        del self._network, self._named
