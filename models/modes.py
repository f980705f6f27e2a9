"""Training and evaluation mode, module by module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["modes_kept"]


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Restore the mode of every module at the end, so that parts frozen in eval mode stay so.

    Args:
        model: the network.
    """
    was_training = {part: part.training for part in model.modules()}
    try:
        yield
    finally:
        for part, training in was_training.items():
            part.training = training
