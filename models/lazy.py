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
    """Run zeros of `input_shape`, that of one sample, through a network that has layers without shapes, on its device.

    The network is changed in place, and only then. Raises UsageError when the network cannot take such an input, or when
    a layer is left without a shape, since the input does not reach it.
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
            expected="The shape that it was trained on was expected.",
            do="Give its layers their sizes in the code.",
        ) from cause
    require_shapes(module)


def require_shapes(module: nn.Module) -> None:
    """Raise UsageError for a network that has layers without shapes."""
    without = [name for name, value in module.state_dict(keep_vars=True).items() if is_lazy(value)]
    if without:
        raise UsageError(
            f"{', '.join(without)} of {type(module).__name__} {'have' if len(without) > 1 else 'has'} no shape yet.",
            expected="Every layer of the network was expected to be initialised.",
            do="Run one batch through the network in its factory, or give its layers their sizes.",
        )
