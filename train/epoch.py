"""An epoch under way: where it stands, what it has lost so far, how long it has taken."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparse_export.train.checkpoint import Position

__all__ = ["EpochSoFar"]


@dataclass(kw_only=True)
class EpochSoFar:
    """An epoch in one process.

    Args:
        at: where it was taken up, at its start or within it.
        n_updates_before: mask updates before it.
        step: steps done since the start of the training.
        loss_here: sum over this process's steps of the epoch: a number on the CPU, whose loss is read at
            every step; a tensor on an accelerator, float64, so that the host need not wait.
        began: seconds on a monotonic clock.
    """

    at: Position
    n_updates_before: int
    step: int
    loss_here: float | Tensor
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def taken_up(cls, at: Position, n_updates: int, *, is_first: bool, device: torch.device) -> EpochSoFar:
        """The epoch that a position lies in.

        Args:
            at: the position.
            n_updates: of the masks so far.
            is_first: is this the process that the saved sum of losses belongs to?
            device: of this process.
        """
        loss = at.loss_sum if is_first else 0.0
        return cls(
            at=at,
            n_updates_before=at.n_updates_before if at.step_in_epoch else n_updates,
            step=at.step,
            loss_here=loss
            if device.type == "cpu"
            else torch.tensor(loss, dtype=torch.float64, device=device),
        )

    def add(self, loss: Tensor) -> float:
        """Count the loss of a step. Gives it as a number where it was read, else 0."""
        if isinstance(self.loss_here, Tensor):
            self.loss_here = self.loss_here + loss.detach().double()
            return 0.0
        here = loss.item()
        self.loss_here += here
        return here

    @property
    def seconds(self) -> float:
        """Trained so far, the epochs before this one included."""
        return self.at.seconds + time.monotonic() - self.began

    @property
    def step_ms(self) -> float | None:
        """Mean wall time of a step since it was taken up; None before the first one."""
        n_steps = self.step - self.at.step
        return 1000 * (time.monotonic() - self.began) / n_steps if n_steps else None

    def position(self, *, step_in_epoch: int, loss_sum: float, metrics_bytes: int) -> Position:
        """Within the epoch. loss_sum: over all processes."""
        return Position(
            step=self.step,
            epoch=self.at.epoch,
            step_in_epoch=step_in_epoch,
            loss_sum=loss_sum,
            n_updates_before=self.n_updates_before,
            seconds=self.seconds,
            metrics_bytes=metrics_bytes,
        )

    def position_after(self, *, metrics_bytes: int) -> Position:
        """At the start of the next epoch."""
        return Position(
            step=self.step,
            epoch=self.at.epoch + 1,
            n_updates_before=self.n_updates_before,
            seconds=self.seconds,
            metrics_bytes=metrics_bytes,
        )
