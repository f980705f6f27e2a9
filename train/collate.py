"""A batch of samples of differing shapes, by a function of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_export import models
from sparse_export.errors import UsageError
from sparse_export.own_code import kind_of
from sparse_export.train.loader import Batch

__all__ = ["Collate"]

_RETURNS = (
    "A pair was expected: a mapping of tensors by the names of the inputs, and a tensor of targets, all with "
    "the samples along their first axis."
)


class Collate:
    """Calls such a function, and checks what it gives. It may be sent to worker processes.

    Args:
        name: `package.module:function`, which is called with a list of pairs, the inputs of a sample as
            tensors by name and its target as a tensor, and gives both of the whole batch.

    Raises:
        UsageError: it cannot be imported, or is no function.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._function: Callable[[list[Batch]], Any] = models.function_named(name)

    def __getstate__(self) -> str:
        return self._name

    def __setstate__(self, name: str) -> None:
        Collate.__init__(self, name)

    def __call__(self, samples: list[Batch]) -> Batch:
        """The batch of some samples.

        Raises:
            UsageError: the function fails, or gives something else.
        """
        try:
            found = self._function(list(samples))
        except (Exception, SystemExit) as cause:  # whatever code of other people raises
            raise UsageError(
                f"The collate function {self._name} failed for {len(samples)} samples with "
                f"{type(cause).__name__}: {cause}.",
                do="Call it in Python to see the whole traceback.",
            ) from cause
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise UsageError(f"The collate function {self._name} gives {kind_of(found)}.", expected=_RETURNS)
        inputs, targets = found
        names = list(samples[0][0])
        if not isinstance(inputs, Mapping) or not isinstance(targets, Tensor):
            raise UsageError(
                f"The collate function {self._name} gives {kind_of(inputs)} and {kind_of(targets)}.",
                expected=_RETURNS,
            )
        if sorted(inputs) != sorted(names):
            raise UsageError(
                f"The collate function {self._name} gives the inputs {', '.join(map(str, inputs))}.",
                expected=f"{', '.join(names)} were expected, as in the samples.",
                do="Give the samples every input of the network, also a mask: they are scored one shape at a "
                "time, without being padded.",
            )
        whole = {name: torch.as_tensor(inputs[name]) for name in names}
        wrong = [name for name, one in (*whole.items(), ("the targets", targets)) if len(one) != len(samples)]
        if wrong:
            raise UsageError(
                f"The collate function {self._name} gives another number of samples than {len(samples)} in "
                f"{', '.join(wrong)}.",
                expected=_RETURNS,
            )
        return whole, targets
