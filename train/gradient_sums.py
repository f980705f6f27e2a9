"""Sums of the gradients between two mask updates, where growth goes by their mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_export.errors import UsageError

__all__ = ["GradientSums"]


class GradientSums:
    """Adds up the gradients of some parameters, inactive weights too.

    They are added as they stand after the optimizer's step: a fused optimizer that undoes the scale of a
    GradScaler by itself leaves them scaled, so steps before and after a change of the scale weigh
    differently.

    Args:
        parameters: by name.

    Attributes:
        sums: float, by name, since the last `clear`.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self.sums = {name: torch.zeros_like(value, requires_grad=False) for name, value in parameters.items()}

    @torch.no_grad()
    def add(self, found_inf: Tensor | None) -> None:
        """Add the gradients of a step.

        Args:
            found_inf: where a fused optimizer skips the steps whose gradients overflow, not 0 for such a
                step, which is left out; else None.

        Raises:
            UsageError: a parameter has no gradient.
        """
        for name, value in self._parameters.items():
            if value.grad is None:
                raise UsageError(
                    f"{name} has no gradient.",
                    expected="growth='mean-gradient' expected those of every step.",
                    do="Do not clear gradients before the trainer's step, or choose another growth.",
                )
            gradient = value.grad
            if found_inf is not None:
                gradient = torch.where(found_inf.to(gradient.device) == 0, gradient, 0)
            self.sums[name].add_(gradient)

    def clear(self) -> None:
        """Begin anew, as after an update."""
        for total in self.sums.values():
            total.zero_()

    def take_over(self, saved: Mapping[str, Any]) -> None:
        """Go on from saved sums, by name."""
        for name, total in self.sums.items():
            total.copy_(saved[name])
