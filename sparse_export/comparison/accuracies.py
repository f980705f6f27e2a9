"""How often each of two bundles is right, and whether the sparse one lost more than it may."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sparse_export.artefact import Accuracy, Bundle
from sparse_export.comparison.opening import Opened
from sparse_export.data import Inputs
from sparse_export.errors import UsageError
from sparse_export.measure.statistics import AccuracyDifference, paired_accuracy_difference
from sparse_export.runtime import Session

__all__ = ["Accuracies", "Samples", "gate_failed", "measured_accuracies", "require_known"]

_BATCH = 256
_ROUNDING_POINTS = 1e-9

Samples = tuple[Inputs, np.ndarray]
"""Inputs (n, *input_shape) as the network takes them, and labels (n,)."""


@dataclass(frozen=True, kw_only=True)
class Accuracies:
    """Of both bundles. measured: here, with the files that are timed, or else as recorded in the manifests."""

    dense: Accuracy | None
    sparse: Accuracy | None
    difference: AccuracyDifference | None
    measured: bool

    @property
    def drop_points(self) -> float | None:
        """Dense minus sparse, None where one is not known."""
        if self.dense is None or self.sparse is None:
            return None
        return self.dense.percent - self.sparse.percent

    @property
    def source(self) -> Literal["measured", "recorded"] | None:
        if self.drop_points is None:
            return None
        return "measured" if self.measured else "recorded"


def measured_accuracies(
    opened: Opened, dense: Bundle, sparse: Bundle, samples: Samples | None, tell: Callable[[str], None]
) -> Accuracies:
    if samples is None:
        return Accuracies(
            dense=dense.info.accuracy, sparse=sparse.info.accuracy, difference=None, measured=False
        )
    tell(f"accuracy on {len(samples[1])} samples")
    right, other = (_correct(opened.sessions.open[role], dense, *samples) for role in ("dense", "sparse"))
    return Accuracies(
        dense=_accuracy(right),
        sparse=_accuracy(other),
        difference=paired_accuracy_difference(right, other),
        measured=True,
    )


def _correct(session: Session, bundle: Bundle, x: Inputs, y: np.ndarray) -> np.ndarray:
    """Whether each sample is classified rightly, bool (n,)."""
    wanted = bundle.info.model.input_shape
    if x.shape[1:] != wanted or y.shape != x.shape[:1] or not len(x):
        raise UsageError(
            f"The test set has inputs of shape {x.shape} and labels of shape {y.shape}.",
            expected=f"Inputs of shape (n, {', '.join(map(str, wanted))}) and labels (n,) were expected.",
            do="Give the test set that belongs to the bundles.",
        )
    step = min(_BATCH, session.max_batch or _BATCH)
    guesses = [session.run(x[i : i + step]).argmax(axis=1) for i in range(0, len(x), step)]
    correct: np.ndarray = np.concatenate(guesses) == y
    return correct


def _accuracy(correct: np.ndarray) -> Accuracy:
    return Accuracy(n_correct=int(correct.sum()), n_samples=correct.size)


def require_known(found: Accuracies, max_drop: float) -> None:
    """Raise UsageError where nobody can say how much accuracy is lost."""
    if found.drop_points is None:
        raise UsageError(
            f"A drop of at most {max_drop} points is required, but no accuracy is known for both bundles.",
            expected="A test set, or manifests that record an accuracy, were expected.",
            do="Give the test set, or leave the requirement out.",
        )


def gate_failed(found: Accuracies, max_drop: float | None) -> str | None:
    drop, dense, sparse = found.drop_points, found.dense, found.sparse
    if drop is None or dense is None or sparse is None:
        return None
    if max_drop is None or drop <= max_drop + _ROUNDING_POINTS:
        return None
    return (
        f"The sparse accuracy of {sparse.percent:.2f} % is {drop:.2f} percentage points below the dense one of "
        f"{dense.percent:.2f} %."
    )
