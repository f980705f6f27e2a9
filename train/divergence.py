"""Ends a training whose numbers are no longer finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_export.errors import TrainingDiverged, UsageError
from sparse_export.train.checkpoint import state_path

__all__ = ["FiniteNumbers", "update_diverged"]


def update_diverged(step: int, values: Iterable[Tensor], cause: ValueError) -> TrainingDiverged | None:
    """What ended a mask update, where weights are no longer numbers; else None.

    Args:
        step: steps done.
        values: the masked weights.
        cause: what the update raised.
    """
    if all(bool(value.detach().isfinite().all()) for value in values):
        return None
    return TrainingDiverged(
        f"After step {step} weights are no longer numbers: {cause}",
        do="Go on from the last good checkpoint with a lower learning rate or clipped gradients, and leave "
        "out steps whose loss is no finite number.",
    )


@dataclass(frozen=True, kw_only=True)
class FiniteNumbers:
    """Holds a training run to finite numbers.

    All methods raise TrainingDiverged; `step` in them counts from 0.

    Args:
        run: its folder, where the last good state may lie.
        n_steps: of the whole training.
    """

    run: Path
    n_steps: int

    def require_loss(self, loss: float | Tensor, step: int) -> None:
        """loss: of a step or a sum over steps up to this one. Reads from the device."""
        if not math.isfinite(loss):
            raise self._diverged(step, "The loss is no longer a number.")

    def require_weights(self, model: nn.Module, step: int) -> None:
        """step: the one that was done last. Reads from the device."""
        values = [value for value in model.state_dict().values() if value.is_floating_point()]
        if not bool(torch.stack([value.isfinite().all() for value in values]).all()):
            raise self._diverged(step, "The weights are no longer numbers.")

    @contextmanager
    def expected(self, step: int) -> Iterator[None]:
        """A mask update that meets weights or momenta that are no numbers ends the training as diverged."""
        try:
            yield
        except UsageError:
            raise
        except TrainingDiverged as cause:  # as the trainer says it to a loop that has no recipe
            raise self._diverged(step, f"The weights are no longer numbers: {cause.__cause__}") from cause
        except ValueError as cause:
            raise self._diverged(step, f"The weights are no longer numbers: {cause}") from cause

    def _diverged(self, step: int, what: str) -> TrainingDiverged:
        kept = state_path(self.run)
        return TrainingDiverged(
            f"Step {step + 1} of {self.n_steps}: {what}",
            expected="Training was expected to stay finite.",
            do="Lower optimizer.lr in the recipe."
            + (f" The last good state is kept in {kept}." if kept.is_file() else ""),
        )
