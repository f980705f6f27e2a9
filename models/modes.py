"""Training and evaluation mode, module by module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["modes_kept"]


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Give every module back the mode that it had: a part that somebody froze in eval mode stays so."""
    was_training = {part: part.training for part in model.modules()}
    try:
        yield
    finally:
        for part, training in was_training.items():
            part.training = training
