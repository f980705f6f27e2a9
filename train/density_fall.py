"""The density that falls from above to the target while a training explores."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparse_export.errors import UsageError
from sparse_export.sparsity import gradual_density
from sparse_export.train.sparsity_config import SparsityConfig

__all__ = ["DensityFall", "density_fall"]


@dataclass(frozen=True, kw_only=True)
class DensityFall:
    """A density that falls along the cubic schedule of gradual pruning, see `gradual_density`.

    Args:
        first: density at the start, above that of the end and up to 1.
        end: the step at which the density of the end is reached, at least 1.
    """

    first: float
    end: int

    def n_active(self, n_weights: int, n_before: int, *, step: int, n_last: int) -> int:
        """Active weights after an update.

        Args:
            n_weights: all weights.
            n_before: active ones before the update.
            step: optimizer steps done.
            n_last: active weights in the end.

        Returns:
            Never more than n_before, and never fewer than n_last.
        """
        density = gradual_density(step, self.end, n_last / n_weights, first=self.first)
        return min(n_before, max(round(density * n_weights), n_last))


def density_fall(config: SparsityConfig, total_steps: int | None) -> DensityFall | None:
    """The fall of a training's density; None where it has its density from the start.

    Args:
        config: its start_density, falls_until, freeze and method.
        total_steps: length of the training; None where it is not known.

    Raises:
        UsageError: the length of the training is not known.
    """
    first = config.wanted_start_density
    if first is None:
        return None
    if total_steps is None:
        raise UsageError(
            "The density falls over the length of the training, which is not known.",
            expected="total_steps, a freeze above 0 and no masks were expected.",
        )
    return DensityFall(first=first, end=max(1, math.ceil(config.wanted_falls_until * total_steps)))
