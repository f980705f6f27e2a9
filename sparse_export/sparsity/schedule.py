"""The prune rate over time."""

from __future__ import annotations

import math
from typing import Literal, get_args

PruneSchedule = Literal["cosine", "linear", "constant"]


def prune_rate(
    step: int,
    total_steps: int | None,
    *,
    initial: float,
    final: float = 0.005,
    schedule: PruneSchedule = "cosine",
) -> float:
    """The prune rate after `step` of `total_steps` training steps.

    cosine: final + (initial - final) * (1 + cos(pi * step / total)) / 2, the reference's default, which ends at
    0.005.  linear: initial * (1 - step / total), as there.  constant: initial; needs no total.
    Past the end the rate stays at its end. Raises ValueError for cosine and linear without a total, and for a
    schedule that is none of these.
    """
    if schedule not in get_args(PruneSchedule):
        raise ValueError(
            f"schedule is {schedule!r}; one of {', '.join(get_args(PruneSchedule))} was expected."
        )
    if schedule == "constant":
        return initial
    if total_steps is None:
        raise ValueError(f"The {schedule} prune schedule needs the total number of steps.")
    progress = min(step / total_steps, 1.0)
    if schedule == "linear":
        return initial * (1 - progress)
    return final + (initial - final) * (1 + math.cos(math.pi * progress)) / 2
