"""A task: what a network is for, as its loss and its score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from sparse_export.errors import UsageError
from sparse_export.formats.score import Score
from sparse_export.instruments.paired_scores import (
    ScoreDifference,
    paired_bootstrap_difference,
    paired_mean_difference,
)
from sparse_export.own_code import kind_of
from sparse_export.signature import Array
from sparse_export.tasks.stacking import stacked

__all__ = ["Outputs", "Statistics", "Targets", "Task"]

Outputs = Any
"""What a network gives for a batch: an array or tensor, or a mapping by name where there are several."""

Targets = Any
"""What the outputs should be, one a sample: an array, or a list of anything in a task of one's own."""

Statistics = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
"""Of each sample what its score is made of, float64 (n_samples, k)."""


class Task:
    """What a network is for.

    A task of your own derives from it and has `per_sample`, and `loss` where it is to be trained.

    Attributes:
        name: as a command line calls it; of a task of one's own `package.module:name`.
        score_name: the score, as people call it.
        higher_is_better: False for an error.
        is_share: the score lies between 0 and 1, and is given in percent.
        of_sums: `over` takes the sum of the statistics over the samples, (k,), in place of all of them.
        scores_pairs: samples belong together in pairs, so that no part of them may be drawn one by one.
        output_name: of the output of a network with one, in the graph that a new run exports.
        postprocess: the steps of `build --postprocess` that mean something behind such a network; None for
            all of them, as nobody knows.
    """

    name = ""
    score_name = "score"
    higher_is_better = True
    is_share = False
    of_sums = False
    scores_pairs = False
    output_name = "output"
    postprocess: tuple[str, ...] | None = None

    def loss(self, outputs: Outputs, targets: Targets) -> Tensor:
        """Compute the mean loss of a batch, which training goes down.

        Args:
            outputs: of the torch network, as it gives them.
            targets: on the same device.

        Raises:
            UsageError: this task has none.
        """
        raise UsageError(
            f"The task {self.name} has no loss, so nothing can be trained for it.",
            do="Give it a method loss(outputs, targets), or name a loss in the recipe.",
        )

    def per_sample(self, outputs: Outputs, targets: Targets) -> Any:
        """Compute one number a sample, or several that `over` makes the score of.

        Args:
            outputs: arrays of a batch, by name where the network has several outputs.
            targets: of the same samples.

        Returns:
            (n,) or (n, k).
        """
        raise UsageError(
            f"The task {self.name} has no score.", do="Give it a method per_sample(outputs, targets)."
        )

    def over(self, statistics: Statistics) -> float:
        """Compute the score of a set.

        Args:
            statistics: (n, k), or with `of_sums` their sum (k,).

        Returns:
            By default the mean of the first column.
        """
        return float(statistics[:, 0].mean())

    def resampled(self, statistics: Statistics, counts: Statistics) -> Statistics:
        """Compute the scores of sets in which samples stand several times, or not at all.

        Args:
            statistics: (n, k).
            counts: how often each sample stands in each of m sets, (m, n).

        Returns:
            (m,); NaN for a set without a score.
        """
        if self.of_sums:
            return np.array([self.over(sums) for sums in counts @ statistics])
        return np.array([self.over(np.repeat(statistics, one.astype(int), axis=0)) for one in counts])

    def problem(self, targets: Array, n_outputs: int | None) -> str | None:
        """Say why targets do not fit this task, None where they do, or nobody can tell.

        Args:
            targets: of a set.
            n_outputs: of the network, the size of the second axis of its only output; None where it has
                several, or another shape.

        Returns:
            The end of a sentence that begins with "The targets".
        """
        return None

    def n_outputs(self, targets: Tensor) -> int | None:
        """How many outputs a network for these targets has; None where they do not tell."""
        return None

    @property
    def is_mean(self) -> bool:
        """The score is the mean over the samples of one number each."""
        return type(self).over is Task.over

    def statistics(self, outputs: Mapping[str, Array], targets: Targets) -> Statistics:
        """Compute the statistics of a batch, and check them.

        Args:
            outputs: arrays by name.
            targets: of the same samples. A list becomes an array where it holds numbers of one shape, so that
                `per_sample` gets what it gets in training.

        Returns:
            float64 (n, k).

        Raises:
            UsageError: `per_sample` gives something else, or fails.
        """
        given = next(iter(outputs.values())) if len(outputs) == 1 else outputs
        targets = stacked(targets) if isinstance(targets, list) and targets else targets
        try:
            returned = self.per_sample(given, targets)
            found = np.asarray(returned, dtype=np.float64)
        except UsageError:
            raise
        except (Exception, SystemExit) as cause:  # whatever code of other people raises
            shapes = {name: one.shape for name, one in outputs.items()}
            raise UsageError(
                f"The task {self.name} cannot score outputs of shapes {shapes}: "
                f"{type(cause).__name__}: {next(iter(str(cause).splitlines()), '')}.",
                do=f"{_odd_target(targets)}Call its per_sample in Python to see the whole traceback.",
            ) from cause
        n = len(targets)
        if found.ndim == 0 or len(found) != n or not np.isfinite(found).all():
            what = "numbers that are not finite" if found.ndim and len(found) == n else f"shape {found.shape}"
            what = kind_of(returned) if found.ndim == 0 else what
            raise UsageError(
                f"The task {self.name} gives {what} for {n} samples.",
                expected="One finite number for each sample was expected, or (n, k) of them.",
            )
        return found.reshape(n, -1)

    def score(self, statistics: Statistics) -> Score:
        """The score of a set.

        Args:
            statistics: of all its samples, (n, k).
        """
        return self._score(self.over(statistics.sum(0) if self.of_sums else statistics), len(statistics))

    def _score(self, value: float, n_samples: int) -> Score:
        return Score(
            name=self.score_name,
            value=float(value),
            n_samples=n_samples,
            higher_is_better=self.higher_is_better,
            is_share=self.is_share,
        )

    def difference(self, a: Statistics, b: Statistics) -> ScoreDifference:
        """Score of b minus score of a on the same samples, with its paired 95 % interval.

        A mean over the samples has Student's; any other score a bootstrap over the samples.

        Args:
            a: statistics, (n, k).
            b: likewise, in the same order.
        """
        scale = 100.0 if self.is_share else 1.0
        if self.is_mean:
            return paired_mean_difference(a[:, 0], b[:, 0], scale=scale)
        return paired_bootstrap_difference(self.resampled, a, b, scale=scale)


def _odd_target(targets: Targets) -> str:
    """A sentence about the first target that is no number, where some are; else empty."""
    if isinstance(targets, np.ndarray | Tensor):
        return ""
    kinds = [isinstance(one, np.ndarray | int | float | np.generic) for one in targets]
    if all(kinds) or not any(kinds):
        return ""
    at = kinds.index(False)
    return f"Target {at} of these {len(kinds)} is {kind_of(targets[at])}, and others are numbers. "
