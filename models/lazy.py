"""Layers that get their shapes from the first input, as `torch.nn.LazyLinear` does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from sparse_export.errors import UsageError
from sparse_export.models.modes import modes_kept

__all__ = ["give_shapes", "require_shapes"]


def give_shapes(module: nn.Module, input_shape: Sequence[int]) -> None:
    """Give lazy layers their shapes, by running zeros through the network on its device.

    Args:
        module: the network, changed in place where it has lazy layers.
        input_shape: of one sample.

    Raises:
        UsageError: the network cannot take such an input, or a layer still has no shape, since the input does
            not reach it.
    """
    values = [*module.parameters(), *module.buffers()]
    if not any(is_lazy(value) for value in values):
        return
    try:
        with torch.no_grad(), modes_kept(module):
            module.eval()(torch.zeros((1, *input_shape), device=values[0].device))
    except Exception as cause:  # whatever a network raises: some assert, some index
        reason = next(iter(str(cause).splitlines()), type(cause).__name__)
        raise UsageError(
            f"The network {type(module).__name__} cannot take inputs of shape {tuple(input_shape)}, "
            f"which its lazy layers need to get their shapes: {reason.rstrip('.')}.",
            do="Give its layers their sizes in the code.",
        ) from cause
    require_shapes(module)


def require_shapes(module: nn.Module) -> None:
    """Check that all layers of a network have shapes.

    Args:
        module: the network.

    Raises:
        UsageError: a lazy layer has none.
    """
    without = [name for name, value in module.state_dict(keep_vars=True).items() if is_lazy(value)]
    if without:
        raise UsageError(
            f"{', '.join(without)} of {type(module).__name__} "
            f"{'have' if len(without) > 1 else 'has'} no shape yet.",
            do="Run one batch through the network in its factory, or give its layers their sizes.",
        )
