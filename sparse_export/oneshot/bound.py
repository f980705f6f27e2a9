"""The options of a choice of layers, held against each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sparse_export.errors import UsageError
from sparse_export.formats.timings import read_timings
from sparse_export.oneshot.choosing import Progress
from sparse_export.oneshot.graph_choice import Bound
from sparse_export.sparsity.pattern import NMPattern
from sparse_export.tasks.agreement import judge_named
from sparse_export.tasks.scores import MaxDrop, require_possible_drop
from sparse_export.tasks.shipped import Classification, task_named

__all__ = ["bound_of", "require_scored", "with_answers_of_dense"]


def bound_of(
    max_drop: MaxDrop | None,
    timings: str | Path | None,
    progress: Progress | None,
    *,
    pattern: NMPattern,
    has_plan: bool = False,
    norms: bool = False,
    measures: bool = False,
) -> Bound | None:
    """What was asked of a choice of layers.

    Args:
        max_drop: what may be lost; None for no choice.
        timings: file of times.
        progress: told of each score.
        pattern: of the layers.
        has_plan: a layer plan was given too.
        norms: batch norms are re-estimated afterwards.
        measures: changes of layers are measured, and nothing is chosen.

    Returns:
        None where nothing is chosen or measured.

    Raises:
        UsageError: options that exclude each other, or an amount that is none.
    """
    require_possible_drop(max_drop)
    if max_drop is None and not measures:
        if timings is not None:
            raise UsageError(
                "--timings was given without --max-drop.",
                do="Give --max-drop, or make a plan by `sparse-export plan --timings`.",
            )
        return None
    what = "--dry-run" if max_drop is None else "--max-drop"
    if has_plan:
        raise UsageError(f"{what} and --plan are both given; each chooses layers.", do="Leave one out.")
    if norms:
        raise UsageError(
            f"{what} and --norms are both given: batch norms are re-estimated after the score was measured.",
            do="Leave one out.",
        )
    if timings is not None and str(pattern) != "2:4":
        raise UsageError(f"--timings was given, and the pattern {pattern}.", do="Times are of 2:4 products.")
    if timings is not None:
        read_timings(Path(timings))  # before any layer is pruned
    return Bound(max_drop=max_drop, timings=None if timings is None else Path(timings), progress=progress)


def with_answers_of_dense(bound: Bound, task: str | None) -> tuple[Bound, str | None]:
    """Inputs without labels, and classification or a task of a user's own: what the dense network gives counts
    as right.

    Args:
        bound: what was asked.
        task: that was named.

    Returns:
        Both, the task None where it is taken care of.

    Raises:
        UsageError: a task of the user's own whose score does not say how far two networks agree.
    """
    known = None if task is None else task_named(task)
    judge = judge_named(task)
    if judge is not None or isinstance(known, Classification):
        return replace(bound, task=judge or known), None
    return bound, task


def require_scored(data: str | None) -> str:
    """The data that a torch network is scored on. Raises UsageError where there are none."""
    if data is None:
        raise UsageError(
            "--max-drop needs a score, and there are no data to score on.",
            do="Give --data NAME, or real inputs by --inputs FILE.npz.",
        )
    return data
