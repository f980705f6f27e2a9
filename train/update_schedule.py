"""When the masks of a training move, and at what prune rate."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from sparse_export.errors import UsageError
from sparse_export.sparsity import PruneSchedule, prune_rate
from sparse_export.train.arguments import require_steps
from sparse_export.train.sparsity_config import SparsityConfig

__all__ = ["BackOff", "UpdateSchedule", "update_schedule", "with_own_interval"]

_BACK_OFF = 0.7
"""What a prune rate is multiplied by when an update changes no fewer mask bits than the one before."""


@dataclass(frozen=True, kw_only=True)
class UpdateSchedule:
    """The course of a training's mask updates; `step` in the methods is the number of steps done.

    Args:
        total_steps: length of the training; None where it is not known.
        freeze: fraction of it after which masks stand still.
        moves: do masks move at all?
        prune_schedule, initial_rate, final_rate: see `sparse_export.sparsity.prune_rate`.
    """

    total_steps: int | None
    freeze: float
    moves: bool
    prune_schedule: PruneSchedule
    initial_rate: float
    final_rate: float | None

    @property
    def end(self) -> int:
        """The step from which on masks stand still; 0 where the length of the training is not known."""
        return math.ceil(self.freeze * self.total_steps) if self.total_steps is not None else 0

    def is_frozen(self, step: int) -> bool:
        """Do the masks stand still from now on?"""
        if not self.moves:
            return True
        return self.total_steps is not None and step >= self.freeze * self.total_steps

    def is_due(self, step: int, every: int) -> bool:
        """Is a mask update due now, where one is made in `every` steps? None within the last such stretch."""
        if step % every or self.is_frozen(step):
            return False
        return self.total_steps is None or step + every <= self.total_steps

    def next_update(self, step: int, every: int) -> int | None:
        """How many steps will be done at the next update; None for never."""
        at = (step // every + 1) * every
        return at if self.is_due(at, every) else None

    def prune_rate(self, step: int, learning_rate: float = 1.0) -> float:
        """The prune rate of an update now. learning_rate: that of the last step / that of the start."""
        return prune_rate(
            step,
            None if self.total_steps is None else max(1, round(self.freeze * self.total_steps)),
            initial=self.initial_rate,
            final=self.final_rate,
            schedule=self.prune_schedule,
            learning_rate=learning_rate,
        )


def update_schedule(config: SparsityConfig, total_steps: int | None) -> UpdateSchedule:
    """The course of the mask updates of a training.

    Args:
        config: its prune rates, prune schedule, freeze and method.
        total_steps: length of the training, at least 1; None where it is not known.

    Raises:
        UsageError: total_steps is out of its range, or the prune schedule needs it.
    """
    require_steps("total_steps", total_steps)
    schedule = config.prune_schedule
    if schedule in ("cosine", "linear") and total_steps is None:
        raise UsageError(
            f"prune_schedule={schedule!r} needs to know how long training lasts.",
            do="Give total_steps, or choose prune_schedule='constant'.",
        )
    rule, initial = config.rule, config.first_prune_rate
    final: float | None = None
    if schedule != "constant":
        own = rule.final_prune_rate if schedule == "cosine" else 0.0
        final = min(own if config.final_prune_rate is None else config.final_prune_rate, initial)
    return UpdateSchedule(
        total_steps=total_steps,
        freeze=config.wanted_freeze,
        moves=rule.moves,
        prune_schedule=schedule,
        initial_rate=initial,
        final_rate=final,
    )


def with_own_interval(config: SparsityConfig, total_steps: int | None) -> SparsityConfig:
    """The configuration with the update interval of its method, where it sets none and the method has one."""
    share = config.rule.update_share
    if config.update_every or share is None or total_steps is None:
        return config
    return replace(config, update_every=max(1, round(share * total_steps)))


@dataclass(frozen=True, kw_only=True)
class BackOff:
    """The prune-rate back-off: rates under a pattern are lowered where swaps do not get fewer by themselves.

    Weights then come and go in turn.

    Args:
        factor: of the scheduled rate, above 0 and up to 1.
        n_flipped: mask bits that the update before changed; -1 where that says nothing.
    """

    factor: float = 1.0
    n_flipped: int = -1

    def after(self, n_flipped: int, *, same_cap: bool) -> BackOff:
        """What holds after an update.

        Args:
            n_flipped: mask bits that it changed.
            same_cap: did the pattern allow as many weights as before it?
        """
        is_lower = same_cap and 0 <= self.n_flipped <= n_flipped and n_flipped > 0
        return BackOff(
            factor=self.factor * _BACK_OFF if is_lower else self.factor,
            n_flipped=n_flipped if same_cap else -1,
        )
