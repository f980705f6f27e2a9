"""The score of any set of layers on the samples that were held back, against the dense network's."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sparse_export.formats.score import Score
from sparse_export.oneshot.held_back import HeldBack
from sparse_export.oneshot.switchable import SwitchableSession, Weights
from sparse_export.runtimes.outputs import output_batches
from sparse_export.signature import Array
from sparse_export.tasks.agreement import agreement_of, as_targets
from sparse_export.tasks.labels import predicted_classes
from sparse_export.tasks.scores import MaxDrop, allowed_drop, drop_of, lost_too_much
from sparse_export.tasks.shipped import Classification
from sparse_export.tasks.task import Statistics, Targets

__all__ = ["AGREEMENT_NAME", "HeldScores", "Measured"]

AGREEMENT_NAME = "agreement"
SAME_CLASSES = "agreement of classes"
_LEAST_SEEN = 64  # samples, before a set is given up on a part of them
_ERRORS = 4.0  # standard errors that its drop has to be beyond what may be lost


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A set of layers on the held-back samples.

    Attributes:
        score: on those that were seen.
        lost: how much worse it is than the dense network's on the same samples, in the unit of the score.
        n_seen: samples that were seen; fewer than all where it was plain by then that too much is lost.
        passes: all were seen, and no more is lost than may be.
    """

    score: Score
    lost: float
    n_seen: int
    passes: bool


class HeldScores:
    """Measures sets of layers with one session, and counts what that took.

    Attributes:
        dense: score of the dense network.
        allowed: what may be lost, in the unit of the score.
        spent: scores on all samples that were made, a part of the samples as that part of one.
    """

    def __init__(self, session: SwitchableSession, held: HeldBack, max_drop: MaxDrop) -> None:
        """Measure the dense network.

        Args:
            session: stays open.
            held: the samples.
            max_drop: what may be lost.

        Raises:
            GateFailed: its outputs are NaN or infinite.
            UsageError: the task cannot score its outputs.
        """
        self._session, self._held, self._max_drop = session, held, max_drop
        self._outputs: list[dict[str, Array]] = []
        self._statistics: list[Statistics] = []
        self._name: str | None = None
        if held.task is not None and held.targets is None:
            of_classes = isinstance(held.task, Classification)
            self._name = (
                SAME_CLASSES if of_classes else f"{held.task.score_name}, held against the dense network"
            )
            held = replace(held, targets=_answers(session, held))
            self._held = held
        session.use({})
        start = 0
        for feeds, outputs in output_batches(session, held.samples, who="The dense network"):
            n = session.signature.n_samples(feeds)
            if held.task is None:
                self._outputs.append(outputs)
            else:
                self._statistics.append(held.task.statistics(outputs, _rows(held.targets, start, n)))
            start += n
        self.dense = (
            Score(name=AGREEMENT_NAME, value=1.0, n_samples=len(held))
            if held.task is None
            else self._named(held.task.score(np.concatenate(self._statistics)))
        )
        self.allowed = allowed_drop(max_drop, self.dense)
        self.spent = 1.0

    @property
    def one_sample(self) -> float | None:
        """What one sample is worth, of a share of right answers; None of other scores."""
        return None if self.dense.n_correct is None else 100.0 / self.dense.n_samples

    def of(self, weights: Weights, *, give_up: bool) -> Measured:
        """Measure the network with other weights.

        Args:
            weights: see `SwitchableSession.use`.
            give_up: stop where it is plain on a part of the samples that too much is lost.
        """
        self._session.use(weights)
        found = self._agreement() if self._held.task is None else self._score(give_up)
        self.spent += found.n_seen / len(self._held)
        return found

    def _agreement(self) -> Measured:
        signature = self._session.signature
        batches = output_batches(self._session, self._held.samples, who="The sparse network")
        pairs = ((dense, outputs) for dense, (_, outputs) in zip(self._outputs, batches, strict=True))
        found = agreement_of(pairs, signature, inputs=self._held.words)
        score = Score(name=AGREEMENT_NAME, value=found.percent / 100.0, n_samples=found.n_samples)
        return self._measured(score, self.dense, len(self._held))

    def _score(self, give_up: bool) -> Measured:
        task = self._held.task
        assert task is not None
        found: list[Statistics] = []
        n_seen = 0
        for feeds, outputs in output_batches(self._session, self._held.samples, who="The sparse network"):
            n = self._session.signature.n_samples(feeds)
            found.append(task.statistics(outputs, _rows(self._held.targets, n_seen, n)))
            n_seen += n
            if give_up and task.is_mean and n_seen >= _LEAST_SEEN and n_seen < len(self._held):
                before = np.concatenate(self._statistics[: len(found)])
                now = np.concatenate(found)
                if self._is_beyond(before[:, 0] - now[:, 0]):
                    score, reference = task.score(now), task.score(before)
                    return Measured(score=score, lost=score.worse_by(reference), n_seen=n_seen, passes=False)
        return self._measured(self._named(task.score(np.concatenate(found))), self.dense, n_seen)

    def _named(self, score: Score) -> Score:
        return score if self._name is None else replace(score, name=self._name)

    def _is_beyond(self, apart: Statistics) -> bool:
        """Is the drop on some samples more than may be lost by any chance?"""
        scale = (100.0 if self.dense.is_share else 1.0) * (1 if self.dense.higher_is_better else -1)
        error = float(apart.std(ddof=1)) / math.sqrt(len(apart)) * abs(scale)
        return float(apart.mean()) * scale - _ERRORS * error > self.allowed

    def _measured(self, score: Score, reference: Score, n_seen: int) -> Measured:
        lost = drop_of(score, reference)
        assert lost is not None
        return Measured(
            score=score,
            lost=lost,
            n_seen=n_seen,
            passes=lost_too_much("", lost, "", self._max_drop, self.dense) is None,
        )


def _rows(targets: Any, start: int, n: int) -> Any:
    return targets[start : start + n]


def _answers(session: SwitchableSession, held: HeldBack) -> Targets:
    """The classes that the dense network gives; for a task of a user's own its outputs."""
    session.use({})
    found = [outputs for _, outputs in output_batches(session, held.samples, who="The dense network")]
    if not isinstance(held.task, Classification):
        return [target for one in found for target in as_targets(one, session.signature)]
    (name,) = session.signature.output_names
    return np.concatenate([predicted_classes(one[name]) for one in found])
