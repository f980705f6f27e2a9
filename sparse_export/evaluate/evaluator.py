"""Runs a session, a file or a network over samples: its outputs, and what its score is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sparse_export.errors import UsageError
from sparse_export.formats.bundle import Bundle
from sparse_export.formats.score import Score
from sparse_export.instruments.paired_scores import ScoreDifference
from sparse_export.runtimes import Session
from sparse_export.runtimes.outputs import joint_batches
from sparse_export.signature import Array, Feeds, joined
from sparse_export.tasks.data import Inputs
from sparse_export.tasks.samples import LabelledSamples, SingleInput, labelled
from sparse_export.tasks.shipped import task_named
from sparse_export.tasks.task import Statistics, Targets, Task

__all__ = ["Samples", "Scored", "checked_samples", "score", "score_each"]

_KEPT_VALUES = 2**26  # of outputs, for the parity of two runtimes

Samples = tuple[Inputs | Tensor, Targets]
"""Inputs (n, *input_shape) as the network takes them, and targets, one a sample, as a caller gives them."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a network made of a test set.

    Attributes:
        outputs: by name, those of fixed size, of the first samples, as many as fit into memory.
        statistics: of each sample what its score is made of, float64 (n, k).
        task: whose score it is.
    """

    outputs: Feeds
    statistics: Statistics
    task: Task

    @property
    def score(self) -> Score:
        return self.task.score(self.statistics)

    def minus(self, other: Scored) -> ScoreDifference:
        """This score minus another on the same samples, with its paired interval."""
        return self.task.difference(other.statistics, self.statistics)


def score(session: Session, test: LabelledSamples, who: str = "") -> Scored:
    """Run a session over a test set.

    Args:
        session: stays open.
        test: fits it.
        who: in an error, the runtime by default.

    Raises:
        GateFailed: outputs that are NaN or infinite.
        UsageError: outputs that the task cannot score.
    """
    (found,) = score_each({who or f"The runtime {session.name}": session}, test)
    return found


def score_each(sessions: Mapping[str, Session], test: LabelledSamples) -> tuple[Scored, ...]:
    """Run sessions over a test set, which is read once.

    Args:
        sessions: by what an error calls them; they stay open.
        test: fits them.

    Returns:
        What each made of it, in their order.

    Raises:
        GateFailed: as `score`.
        UsageError: likewise.
    """
    scoring = {who: _Scoring(session, test.task) for who, session in sessions.items()}
    for feeds, targets, outputs in joint_batches(sessions, test):
        for who, one in scoring.items():
            one.add(feeds, outputs[who], targets)
    return tuple(one.scored() for one in scoring.values())


class _Scoring:
    """Collects what a session gives, batch by batch."""

    def __init__(self, session: Session, task: Task) -> None:
        self._signature, self._task = session.signature, task
        self._axes = {one.name: one.axis(self._signature.batch) for one in self._signature.outputs}
        self._kept: list[Feeds] = []
        self._statistics: list[Statistics] = []
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._n, self._most = 0, 0

    def add(self, feeds: Feeds, outputs: Feeds, targets: Targets) -> None:
        self._statistics.append(self._task.statistics(outputs, targets))
        of_a_sample = {name: _of_a_sample(outputs[name], axis) for name, axis in self._axes.items()}
        if not self._n:  # samples, not batches, whose size differs from runtime to runtime
            n_values = sum(map(math.prod, of_a_sample.values()))
            self._most, self._shapes = max(1, _KEPT_VALUES // max(1, n_values)), of_a_sample
        self._shapes = {name: shape for name, shape in self._shapes.items() if of_a_sample[name] == shape}
        if self._n < self._most:
            self._kept.append(outputs)
        self._n += self._signature.n_samples(feeds)

    def scored(self) -> Scored:
        fixed = tuple(one for one in self._signature.outputs if one.name in self._shapes)
        parts = ({one.name: part[one.name] for one in fixed} for part in self._kept)
        whole = joined(parts, fixed, self._signature.batch)
        return Scored(
            outputs={name: _first_of(array, self._axes[name], self._most) for name, array in whole.items()},
            statistics=np.concatenate(self._statistics),
            task=self._task,
        )


def _first_of(array: Array, axis: int | None, most: int) -> Array:
    return array if axis is None else array[(slice(None),) * axis + (slice(most),)]


def _of_a_sample(array: Array, axis: int | None) -> tuple[int, ...]:
    """The shape without the axis that counts samples."""
    return tuple(size for place, size in enumerate(array.shape) if place != axis)


def checked_samples(samples: Samples, bundle: Bundle) -> LabelledSamples:
    """Check samples of a caller against the bundle that is to be scored on them.

    Raises:
        UsageError: its network, the inputs or the targets do not fit each other.
    """
    signature = bundle.info.signature
    x, y = samples
    if isinstance(x, Tensor):
        x = x.detach().cpu().numpy()
    if x.shape[1:] != bundle.info.network_signature.input_shape:
        raise UsageError(
            f"The test set has inputs of shape {x.shape}.",
            expected=f"(n, {', '.join(map(str, bundle.info.network_signature.input_shape))}) was expected.",
            do="Give the test set that belongs to the bundles.",
        )
    return labelled(
        SingleInput(name=signature.input_names[0], inputs=x),
        y,
        task_named(bundle.info.task.name),
        signature,
        of="the test set",
        network=f"The network of {bundle.path}",
        do="Leave the test set out, and compute the score of this task outside.",
    )
