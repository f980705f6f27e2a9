"""CUDA graphs played on the CPU: operations are recorded with their tensors, undone, and repeated in place.

As in a graph, whatever is no tensor keeps the value of the recording, every tensor its memory, and a value
that is read back to the host is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def recorded(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A `sparse_export.train.captured.Capture` of the CPU."""
    recorder = _Recorder()
    with torch.random.fork_rng(devices=[]), recorder:
        result = call()
    recorder.undo()
    return recorder.repeat, result


_UNTOLD = ("running_mean", "running_var")  # batch norms write into these, and their schemas do not say so


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._done: list[tuple[Any, Sequence[Any], dict[str, Any], Any]] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        kwargs = kwargs or {}
        by_name = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written or argument.name in _UNTOLD:
                for tensor in _tensors(by_name.get(argument.name)):
                    self._before.append((tensor, tensor.detach().clone()))
        out = func(*args, **kwargs)
        self._done.append((func, args, kwargs, out))
        return out

    @torch.no_grad()
    def undo(self) -> None:
        for tensor, value in reversed(self._before):
            tensor.copy_(value)
        self._before.clear()

    @torch.no_grad()
    def repeat(self) -> None:
        for func, args, kwargs, out in self._done:
            for old, new in zip(_tensors(out), _tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
