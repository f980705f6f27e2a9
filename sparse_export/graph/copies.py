"""Copies of torch networks, whatever they keep between two calls."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from sparse_export.errors import UsageError

__all__ = ["copy_of"]


def copy_of(network: nn.Module, *, share: bool = False) -> nn.Module:
    """Copy a network with its weights.

    Tensors that a forward computed and left in a module, as the hooks of weight_norm and a state of the last
    call are, lose their history of gradients in the copy; torch refuses to copy them with it.

    Args:
        network: any.
        share: let the parameters of the copy lie in the memory of the network's, for a copy whose weights
            nobody changes. They are other objects, on whose gradients and data nothing of the network depends.

    Raises:
        UsageError: it holds something that cannot be copied, like a lock or an open file.
    """
    known: dict[int, Any] = {id(one): one.detach().clone() for one in _tensors_in(network) if not one.is_leaf}
    if share:
        plain = (one for one in network.parameters() if type(one) is nn.Parameter)
        known |= {id(one): nn.Parameter(one.detach(), one.requires_grad) for one in plain}
    try:
        return copy.deepcopy(network, known)
    except Exception as cause:  # whatever the objects in a user's network raise
        raise UsageError(
            f"The network {type(network).__name__} cannot be copied: {str(cause) or type(cause).__name__}.",
            do="Take what cannot be copied out of the network, or write its run with "
            "model='package.module:factory' and build that folder.",
        ) from cause


def _tensors_in(network: nn.Module) -> Iterator[Tensor]:
    """Buffers, and tensors that are plain attributes, also within lists, tuples and mappings of them."""
    for module in network.modules():
        found = [value for name, value in vars(module).items() if name not in ("_parameters", "_modules")]
        while found:
            value: Any = found.pop()
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, Mapping):
                found.extend(value.values())
            elif isinstance(value, tuple | list):
                found.extend(value)
