"""Runs a torch network behind the interface of all runtimes, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_export.errors import UsageError
from sparse_export.runtimes.session import BaseSession
from sparse_export.signature import Array, Feeds, Signature

__all__ = ["TorchSession"]


class TorchSession(BaseSession):
    """A network in evaluation mode. It stays the caller's.

    Args:
        network: on the CPU.
        signature: of the network.
    """

    def __init__(self, network: nn.Module, signature: Signature) -> None:
        super().__init__("torch-cpu", signature)
        self._network = network

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        """Raises UsageError where the network does not take the inputs, or gives others than it should."""
        shapes = ", ".join(str(array.shape) for array in feeds.values())
        name = type(self._network).__name__
        try:
            with torch.inference_mode():
                output = self._network(*(torch.from_numpy(feeds[key]) for key in self.signature.input_names))
        except Exception as cause:  # whatever forward raises
            raise UsageError(
                f"The network {name} does not take inputs {shapes}: {str(cause) or type(cause).__name__}.",
                expected=f"It was expected to take {', '.join(map(str, self.signature.inputs))}.",
                do="Remove from forward what depends on the batch size, if it takes others.",
            ) from cause
        n, (wanted,) = self.signature.n_samples(feeds), self.signature.outputs
        if not isinstance(output, Tensor) or output.ndim != len(wanted.shape) or len(output) != n:
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UsageError(
                f"The network {name} returns {found} for inputs {shapes}.",
                expected=f"{wanted} was expected.",
                do="Wrap it in a module that returns the logits alone.",
            )
        return {wanted.name: output.numpy()}

    def _free(self) -> None:
        del self._network
