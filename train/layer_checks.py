"""Layers that sparse training cannot do anything good for: frozen, unused, or emptied."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparse_export.errors import UsageError

__all__ = ["EmptyLayers", "require_trained", "warn_of_unused"]


def require_trained(parameters: Mapping[str, Tensor]) -> None:
    """Raise UsageError for weights that are frozen. parameters: the masked weights, by name."""
    frozen = [name for name, value in parameters.items() if not value.requires_grad]
    if frozen:
        raise UsageError(
            f"{_listed(frozen)} {'is' if len(frozen) == 1 else 'are'} frozen (requires_grad is False): masks "
            "would be trained there, and weights would not.",
            do=f"Leave them dense by keep_dense={frozen}, or set requires_grad before the trainer is made.",
        )


def warn_of_unused(parameters: Mapping[str, Tensor], optimizers: Iterable[Optimizer]) -> bool:
    """Warn of masked weights that got no gradient in the first step.

    Args:
        parameters: by name, after the backward pass.
        optimizers: what trains them; a weight that is in none is trained in another form at the moment.

    Returns:
        Whether that could be seen; not where no weight has a gradient any more.
    """
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    held = {id(value) for group in groups for value in group["params"]}
    trained = {name: value for name, value in parameters.items() if id(value) in held}
    without = [name for name, value in trained.items() if value.grad is None]
    if len(without) == len(trained):
        return False
    if without:
        warnings.warn(
            f"{_listed(without)} got no gradient in the first step. Where the network does not use "
            f"{'it' if len(without) == 1 else 'them'}, leave dense what masks cannot help: "
            f"keep_dense={without}.",
            stacklevel=2,
        )
    return True


class EmptyLayers:
    """Warns, once a layer, of layers that have no active weight.

    On an accelerator the counts of one update are read at the next look, so that no update waits for them.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._seen: tuple[Sequence[str], Tensor] | None = None

    def note(self, masks: Mapping[str, Tensor]) -> None:
        """Take in masks as they are now."""
        alive = torch.stack([mask.any() for mask in masks.values()])
        self._seen = (list(masks), alive)
        if alive.device.type == "cpu":
            self.look()

    def look(self) -> None:
        """Warn of what was noted last. Reads from the device."""
        if self._seen is None:
            return
        (names, alive), self._seen = self._seen, None
        empty = [name for name, is_alive in zip(names, alive.tolist(), strict=True) if not is_alive]
        new = [name for name in empty if name not in self.names]
        self.names = empty
        if new:
            warnings.warn(
                f"{_listed(new)} {'has' if len(new) == 1 else 'have'} no active weight left: nothing passes "
                f"through. Leave dense by keep_dense={new}, choose redistribution 'own', which keeps each "
                "layer's count, or a higher density.",
                stacklevel=2,
            )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
