"""Which weights of a network its outputs in evaluation do not depend on, as those of an auxiliary head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["unused_weights"]


def unused_weights(
    model: nn.Module, outputs: Callable[[], list[Tensor]], names: Sequence[str]
) -> tuple[str, ...]:
    """Find weights that no output depends on: without a gradient, and free to be no numbers.

    Args:
        model: in evaluation mode; as it was when this returns.
        outputs: calls it, always on the same inputs.
        names: of the weights to look at.

    Returns:
        Some of the names; not all of them.
    """
    parameters = {name: model.get_parameter(name) for name in names}
    asked = {name: value for name, value in parameters.items() if value.requires_grad}
    try:
        with torch.enable_grad():
            sums = [one.sum() for one in outputs() if one.requires_grad]
            if not sums or not asked:
                return ()
            found = torch.autograd.grad(sums, list(asked.values()), allow_unused=True)
    except (RuntimeError, NotImplementedError):  # a network that has no gradients in evaluation
        return ()
    without = [name for name, gradient in zip(asked, found, strict=True) if gradient is None]
    spare = tuple(name for name in without if not _matters(outputs, asked[name]))
    return spare if len(spare) < len(names) else ()


@torch.no_grad()
def _matters(outputs: Callable[[], list[Tensor]], weight: nn.Parameter) -> bool:
    """Do outputs change where a weight is no number?"""
    before, kept = outputs(), weight.detach().clone()
    try:
        weight.fill_(math.nan)
        after = outputs()
    finally:
        weight.copy_(kept)
    return len(before) != len(after) or not all(map(torch.equal, before, after))
