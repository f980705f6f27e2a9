"""Attention of torch's own modules, computed one product after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["attention_in_parts"]


@contextmanager
def attention_in_parts() -> Iterator[None]:
    """Switch off torch's fast path for `nn.TransformerEncoder` and `nn.MultiheadAttention` in evaluation.

    As one operator it calls none of the linear layers within, so that nothing can be noted of them; it puts
    zeros in place of padded tokens, which no exported graph does; and it warns of nested tensors.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
