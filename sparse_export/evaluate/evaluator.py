"""Runs a session, a file or a network over samples: its logits, and which of its predictions are right."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sparse_export.errors import UsageError
from sparse_export.formats.bundle import Bundle
from sparse_export.formats.run import Accuracy
from sparse_export.runtimes import Session
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.runtimes.outputs import outputs_of
from sparse_export.runtimes.session import only_array
from sparse_export.signature import Array
from sparse_export.tasks.data import Inputs
from sparse_export.tasks.labels import (
    GivenLabels,
    accuracy_of,
    correct_predictions,
    require_labels,
    require_outputs,
)
from sparse_export.tasks.samples import LabelledSamples, SingleInput

__all__ = ["BoolArray", "Samples", "Scored", "checked_samples", "score", "score_file"]

BoolArray = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]

Samples = tuple[Inputs | Tensor, GivenLabels]
"""Inputs (n, *input_shape) as the network takes them, and labels (n,), as a caller gives them."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a network made of a test set.

    Attributes:
        logits: (n, classes).
        correct: bool (n,), which predictions are right.
    """

    logits: Array
    correct: BoolArray

    @property
    def accuracy(self) -> Accuracy:
        return accuracy_of(self.correct)


def score(session: Session, test: LabelledSamples, who: str = "") -> Scored:
    """Run a session over a test set.

    Args:
        session: stays open.
        test: fits it.
        who: in an error, the runtime by default.

    Raises:
        GateFailed: outputs that are NaN or infinite.
        UsageError: outputs that are not (samples, classes).
    """
    return _scored(only_array(outputs_of(session, test.samples, who=who), session.name), test)


def score_file(bundle: Bundle, test: LabelledSamples, n_threads: int | None) -> Scored:
    """As `score`, of a bundle's ONNX file by onnxruntime on the CPU."""
    with open_session(bundle.onnx_path, signature=bundle.info.signature, n_threads=n_threads) as session:
        return score(session, test, f"The ONNX file {bundle.onnx_path}")


def _scored(logits: Array, test: LabelledSamples) -> Scored:
    return Scored(logits=logits, correct=correct_predictions(logits, test.labels))


def checked_samples(samples: Samples, bundle: Bundle) -> LabelledSamples:
    """Check samples of a caller against the bundle that is to be scored on them.

    Raises:
        UsageError: the bundle's network has one output, or inputs or labels do not fit it.
    """
    signature = bundle.info.signature
    n_classes = require_outputs(
        signature.n_classes,
        f"The network of {bundle.path}",
        do="Leave the test set out, and compute the score of this task outside.",
    )
    x, y = samples
    if isinstance(x, Tensor):
        x = x.detach().cpu().numpy()
    if x.shape[1:] != signature.input_shape:
        raise UsageError(
            f"The test set has inputs of shape {x.shape}.",
            expected=f"(n, {', '.join(map(str, signature.input_shape))}) was expected.",
            do="Give the test set that belongs to the bundles.",
        )
    labels = require_labels(y, n_samples=len(x), n_outputs=n_classes, of="the test set")
    inputs = SingleInput(name=signature.input_names[0], inputs=x)
    return LabelledSamples(samples=inputs, labels=labels)
