"""What changes over time: the prune rate, the cap, and the density of gradual pruning."""

from __future__ import annotations

import math
from typing import Literal, get_args

from sparse_export.sparsity.pattern import NMPattern

PruneSchedule = Literal["cosine", "linear", "constant", "learning-rate"]


def prune_rate(
    step: int,
    total_steps: int | None,
    *,
    initial: float,
    final: float | None = None,
    schedule: PruneSchedule = "cosine",
    learning_rate: float = 1.0,
) -> float:
    """The prune rate after `step` of `total_steps` training steps.

    cosine: final + (initial - final) * (1 + cos(pi * step / total)) / 2, the reference's default, which ends
    at 0.005.  linear: final + (initial - final) * (1 - step / total), which ends at 0, as there.  constant:
    initial; needs no total.  learning-rate: final + (initial - final) * learning_rate, which ends at 0 where
    that does; needs no total.  learning_rate: that of the last step / that of the start, 0 to 1.  final:
    where these end, in place of these numbers. Past the end the rate stays at its end. Raises ValueError for
    cosine and linear without a total, for constant with a final, and for a schedule that is none of these.
    """
    if schedule not in get_args(PruneSchedule):
        raise ValueError(
            f"schedule is {schedule!r}; one of {', '.join(get_args(PruneSchedule))} was expected."
        )
    if schedule == "constant":
        if final is not None:
            raise ValueError(f"The constant prune schedule ends at {initial}, and final is {final}.")
        return initial
    if schedule == "learning-rate":
        end = 0.0 if final is None else final
        return end + (initial - end) * learning_rate
    if total_steps is None:
        raise ValueError(f"The {schedule} prune schedule needs the total number of steps.")
    progress = min(step / total_steps, 1.0)
    if schedule == "linear":
        end = 0.0 if final is None else final
        return end + (initial - end) * (1 - progress)
    final = 0.005 if final is None else final
    return final + (initial - final) * (1 + math.cos(math.pi * progress)) / 2


def cap_size(
    step: int, total_steps: int | None, pattern: NMPattern, approach: tuple[float, float] = (0.0, 0.0)
) -> int:
    """How many of every M may be active at a step: M before the approach, N after it.

    approach: the fractions of total_steps at which the first and the last of the M - N cuts fall; those
    between are spread evenly. (0, 0) has N from the first step on; (1/6, 1/3) with 2:4 goes 4:4, 3:4, 2:4.
    Raises ValueError for fractions that are not 0 <= first <= last <= 1, and for an approach without
    total_steps.
    """
    first, last = approach
    if not 0 <= first <= last <= 1:
        raise ValueError(f"approach is {approach}; two fractions with 0 <= first <= last <= 1 were expected.")
    if last == 0:
        return pattern.n
    if total_steps is None:
        raise ValueError("An approach to a pattern needs the total number of steps.")
    n_cuts = pattern.m - pattern.n
    spacing = (last - first) / (n_cuts - 1) if n_cuts > 1 else 0.0
    n_done = sum(step >= round((first + cut * spacing) * total_steps) for cut in range(n_cuts))
    return pattern.m - n_done


def gradual_density(step: int, end: int, final: float, *, first: float = 1.0) -> float:
    """The density of gradual pruning after `step` steps: from `first` at the start down to `final` at step
    `end`.

    final + (first - final) * (1 - step / end)^3. Source: Zhu & Gupta 2017, "To prune, or not to prune",
    eq. 1.
    """
    progress = min(step / end, 1.0) if end > 0 else 1.0
    return final + (first - final) * (1 - progress) ** 3
