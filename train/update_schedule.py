"""When the masks of a training move, and at what prune rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from sparse_export.errors import UsageError
from sparse_export.sparsity import PruneSchedule, prune_rate
from sparse_export.train.arguments import require_fraction, require_one_of, require_steps
from sparse_export.train.methods import Method

__all__ = ["Calm", "UpdateSchedule", "update_schedule"]

_CALMER = (
    0.7  # what a prune rate is multiplied by when an update changes no fewer mask bits than the one before
)


@dataclass(frozen=True, kw_only=True)
class UpdateSchedule:
    """The course of a training's mask updates; `step` in the methods is the number of steps done.

    total_steps: length of the training; None where nobody said.  freeze: fraction of it after which masks stand still.
    moves: do masks move at all?
    initial_rate, final_rate: of the prune schedule, see `sparse_export.sparsity.prune_rate`.
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

    def prune_rate(self, step: int) -> float:
        """The prune rate of an update now."""
        return prune_rate(
            step,
            None if self.total_steps is None else max(1, round(self.freeze * self.total_steps)),
            initial=self.initial_rate,
            final=self.final_rate,
            schedule=self.prune_schedule,
        )


def update_schedule(
    name: str,
    method: Method,
    *,
    total_steps: int | None,
    freeze: float | None,
    prune_rate: float,
    final_prune_rate: float | None,
    prune_schedule: PruneSchedule | None,
) -> UpdateSchedule:
    """What `SparseTraining` was asked for, and what the method decides where it was not.

    name: of the method.  Raises UsageError for settings that cannot be meant.
    """
    if not method.moves and freeze is not None:
        raise UsageError(
            f"freeze is {freeze}, and the method is {name!r}, whose masks never move.",
            do="Leave out freeze, or choose another method.",
        )
    freeze = method.freeze if freeze is None else freeze
    require_fraction("prune_rate", prune_rate)
    if final_prune_rate is not None:
        require_fraction("final_prune_rate", final_prune_rate)
    require_fraction("freeze", freeze)
    require_steps("total_steps", total_steps)
    require_one_of("prune_schedule", prune_schedule, get_args(PruneSchedule))
    if prune_schedule in ("cosine", "linear") and total_steps is None:
        raise UsageError(
            f"prune_schedule={prune_schedule!r} needs to know how long training lasts.",
            do="Give total_steps, or choose prune_schedule='constant'.",
        )
    schedule: PruneSchedule = prune_schedule or ("cosine" if total_steps else "constant")
    return UpdateSchedule(
        total_steps=total_steps,
        freeze=freeze,
        moves=method.moves,
        prune_schedule=schedule,
        initial_rate=prune_rate,
        final_rate=_final_rate(schedule, prune_rate, final_prune_rate, method),
    )


def _final_rate(schedule: PruneSchedule, initial: float, asked: float | None, method: Method) -> float | None:
    """Where the prune rate ends: as asked, else by schedule and method. Raises UsageError for an end of `constant`."""
    if schedule == "constant":
        if asked is not None:
            raise UsageError(
                f"final_prune_rate is {asked}, and the prune schedule is 'constant'.",
                expected="No final_prune_rate was expected: that schedule stays at prune_rate.",
                do="Leave it out, or choose prune_schedule='cosine' or 'linear' with total_steps.",
            )
        return None
    if asked is None:
        asked = 0.0 if schedule == "linear" else method.final_prune_rate
    return min(asked, initial)


@dataclass(frozen=True, kw_only=True)
class Calm:
    """What prune rates under a pattern are lowered by, where swaps do not get fewer by themselves.

    Weights then come and go in turn.  factor: of the scheduled rate.
    n_flipped: mask bits that the update before changed; -1 where that says nothing.
    """

    factor: float = 1.0
    n_flipped: int = -1

    def after(self, n_flipped: int, *, same_cap: bool) -> Calm:
        """What holds after an update. same_cap: the pattern allowed as many weights as before it."""
        calmer = same_cap and 0 <= self.n_flipped <= n_flipped and n_flipped > 0
        return Calm(
            factor=self.factor * _CALMER if calmer else self.factor, n_flipped=n_flipped if same_cap else -1
        )
