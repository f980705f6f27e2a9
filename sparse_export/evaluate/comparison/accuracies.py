"""How often each of two bundles is right, and whether the sparse one lost more than it may."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from sparse_export.errors import UsageError
from sparse_export.evaluate.comparison.open import Opened
from sparse_export.formats.bundle import Bundle
from sparse_export.formats.run import Accuracy
from sparse_export.instruments.statistics import AccuracyDifference, paired_accuracy_difference
from sparse_export.runtimes.logits import accuracy, session_logits
from sparse_export.tasks.data import Inputs
from sparse_export.tasks.labels import GivenLabels, correct_predictions, require_labels, require_outputs

__all__ = [
    "Accuracies",
    "CheckedSamples",
    "Samples",
    "checked_samples",
    "gate_failed",
    "measured_accuracies",
    "require_known",
]

_ROUNDING_POINTS = 1e-9

Samples = tuple[Inputs | Tensor, GivenLabels]
"""Inputs (n, *input_shape) as the network takes them, and labels (n,), as a caller gives them."""

CheckedSamples = tuple[Inputs, np.ndarray[tuple[int, ...], np.dtype[np.int64]]]
"""The same, held against a bundle."""


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


def checked_samples(samples: Samples, bundle: Bundle) -> CheckedSamples:
    """Samples that a bundle can be scored on.

    Raises:
        UsageError: the bundle's network has one output, or inputs or labels do not fit it.
    """
    model = bundle.info.model
    require_outputs(
        model.n_classes,
        f"The network of {bundle.path}",
        do="Leave the test set out, and compute the score of this task outside.",
    )
    x, y = samples
    if isinstance(x, Tensor):
        x = x.detach().cpu().numpy()
    if x.shape[1:] != model.input_shape:
        raise UsageError(
            f"The test set has inputs of shape {x.shape}.",
            expected=f"(n, {', '.join(map(str, model.input_shape))}) was expected.",
            do="Give the test set that belongs to the bundles.",
        )
    return x, require_labels(y, n_samples=len(x), n_outputs=model.n_classes, of="the test set")


def measured_accuracies(
    opened: Opened, dense: Bundle, sparse: Bundle, samples: CheckedSamples | None, tell: Callable[[str], None]
) -> Accuracies:
    """Score both bundles on the samples, or take what their manifests record.

    Raises:
        UsageError: a network whose outputs are not (samples, classes).
        GateFailed: outputs that are NaN or infinite.
    """
    if samples is None:
        return Accuracies(
            dense=dense.info.accuracy, sparse=sparse.info.accuracy, difference=None, measured=False
        )
    x, y = samples
    tell(f"accuracy on {len(y)} samples")
    right, other = (
        correct_predictions(session_logits(opened.sessions.open[role], x, who=f"The {role} bundle"), y)
        for role in ("dense", "sparse")
    )
    return Accuracies(
        dense=accuracy(right),
        sparse=accuracy(other),
        difference=paired_accuracy_difference(right, other),
        measured=True,
    )


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
