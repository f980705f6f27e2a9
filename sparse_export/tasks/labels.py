"""Labels against outputs: whether top-1 accuracy can be computed, and which predictions are correct.

Every score goes through this module: `require_outputs` and `require_labels` before the work,
`correct_predictions` for its result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from sparse_export.errors import UsageError

__all__ = [
    "GivenLabels",
    "LabelProblem",
    "correct_predictions",
    "count_correct",
    "has_class_scores",
    "label_problem",
    "predicted_classes",
    "require_labels",
    "require_outputs",
]

_Array = np.ndarray[Any, Any]
_Bools = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
_Ints = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

GivenLabels = _Array | Tensor | Sequence[Any]
"""Labels as a caller gives them, of any type."""

_TO_CLASS_NUMBERS = "Give one integer per sample, with the classes numbered from 0."


@dataclass(frozen=True, kw_only=True)
class LabelProblem:
    """Why labels are not class numbers.

    Attributes:
        what: ends a sentence that starts with "The labels".
        do: the way out, a sentence.
        task: another task that they are the targets of; None where none is known.
    """

    what: str
    do: str
    task: str | None = None


def label_problem(labels: GivenLabels, *, n_samples: int, n_classes: int) -> LabelProblem | None:
    """Say why labels are not class numbers, None where they are.

    Args:
        labels: NumPy array, tensor on any device, or sequence.
        n_samples: that they are for.
        n_classes: class numbers go from 0 to n_classes - 1; the outputs of a network.

    Returns:
        None for integers of shape (n_samples,), one at least, each from 0 to n_classes - 1.
    """
    try:
        found, dtype = _array_of(labels)
    except (ValueError, TypeError, OverflowError) as cause:
        return LabelProblem(what=f"are not an array: {str(cause).rstrip('.')}", do=_TO_CLASS_NUMBERS)
    problem = _type_problem(found, dtype)
    if problem is not None:
        return problem
    if len(found) != n_samples or not n_samples:
        return LabelProblem(
            what=f"do not match the samples: {len(found)} labels for {n_samples} samples",
            do="Give one label per sample, and one sample at least.",
        )
    low, high = int(found.min()), int(found.max())
    if low >= 0 and high < n_classes:
        return None
    what = f"run from {low} to {high}, outside the class numbers 0 to {n_classes - 1}"
    if low < 0 and high < n_classes:
        what = f"run from {low} to {high}, and class numbers begin at 0"
    if low == 1 and high == n_classes:
        return LabelProblem(what=what, do="Subtract 1: classes are numbered from 0.")
    return LabelProblem(
        what=what, do="Number the classes from 0, one per output; leave out samples that have no class."
    )


def require_labels(labels: GivenLabels, *, n_samples: int, n_outputs: int, of: str) -> _Ints:
    """Check labels against the samples and the network that they are to score.

    Args:
        labels: NumPy array, tensor on any device, or sequence.
        n_samples: that they are for.
        n_outputs: of the network.
        of: what they belong to, for the message.

    Returns:
        The same labels, int64 of shape (n_samples,).

    Raises:
        UsageError: they are not class numbers from 0 to n_outputs - 1, one per sample.
    """
    problem = label_problem(labels, n_samples=n_samples, n_classes=n_outputs)
    if problem is not None:
        raise UsageError(f"The labels of {of} {problem.what}.", do=problem.do)
    return _array_of(labels)[0].astype(np.int64)


def require_outputs(n_outputs: int | None, network: str, *, do: str) -> int:
    """Check that a network has outputs to choose among.

    Args:
        n_outputs: size of the last axis of what it returns; None for a network whose outputs are no scores of
            classes.
        network: for the message.
        do: what to do where it has one, or none, a sentence.

    Returns:
        The number of classes.

    Raises:
        UsageError: it has no scores of classes, or one output, whose largest entry is always number 0.
    """
    if n_outputs is None:
        raise UsageError(
            f"{network} does not return scores (samples, classes), so its top-1 accuracy cannot be computed.",
            do=do,
        )
    if n_outputs < 2:
        raise UsageError(
            f"{network} has one output, so its top-1 accuracy cannot be computed; that needs one per class.",
            do=do,
        )
    return n_outputs


def has_class_scores(logits: _Array | Tensor) -> bool:
    """Whether outputs are (samples, classes), with two classes or more, so that the largest predicts."""
    return logits.ndim == 2 and logits.shape[1] > 1


@overload
def predicted_classes(logits: Tensor) -> Tensor: ...
@overload
def predicted_classes(logits: _Array) -> _Ints: ...
def predicted_classes(logits: Any) -> Any:
    """The number of the largest output of each sample.

    Args:
        logits: (N, classes), an array or a tensor.

    Returns:
        int64 (N,), of the same kind and on the same device. On ties the lower number.

    Raises:
        UsageError: outputs of another shape, or one output per sample.
    """
    if not has_class_scores(logits):
        raise UsageError(
            f"The network returns outputs of shape {tuple(logits.shape)}, so its top-1 accuracy cannot be "
            "computed; that needs (samples, classes), with two classes or more.",
            do="Return one output per class for each sample, or leave the labels out.",
        )
    return logits.argmax(1)


@overload
def correct_predictions(logits: Tensor, labels: Tensor) -> Tensor: ...
@overload
def correct_predictions(logits: _Array, labels: _Ints) -> _Bools: ...
def correct_predictions(logits: Any, labels: Any) -> Any:
    """Which samples are classified as their labels say; one without finite outputs is not.

    Args:
        logits: (N, classes), an array or a tensor.
        labels: class numbers (N,), of the same kind and on the same device.

    Returns:
        bool (N,), of the same kind and on the same device. Nothing is read from a CUDA device.

    Raises:
        UsageError: shapes or types that do not belong together; for arrays also a label without an output.
    """
    predicted = predicted_classes(logits)
    if isinstance(logits, Tensor):
        if labels.shape != predicted.shape or labels.dtype.is_floating_point or labels.dtype == torch.bool:
            require_labels(labels, n_samples=len(logits), n_outputs=logits.shape[1], of="the samples")
        return (predicted == labels) & logits.isfinite().all(1)
    known = require_labels(labels, n_samples=len(logits), n_outputs=logits.shape[1], of="the samples")
    return (predicted == known) & np.isfinite(logits).all(axis=1)


def count_correct(
    network: Callable[[Any], Tensor], batches: Iterable[tuple[Any, Tensor]], device: torch.device
) -> Tensor:
    """Count the correct predictions of a torch network over a set, batch by batch.

    Args:
        network: gives logits (N, classes) for a batch.
        batches: inputs and class numbers (N,), on `device`.
        device: of the count.

    Returns:
        A scalar of type int64, which nothing has been read from: a CUDA device is not waited for.

    Raises:
        UsageError: as `correct_predictions`.
    """
    n_correct = torch.zeros((), dtype=torch.int64, device=device)
    for x, y in batches:
        n_correct += correct_predictions(network(x), y).sum()
    return n_correct


def _array_of(labels: GivenLabels) -> tuple[_Array, str]:
    """The labels as an array, and the name of the type that they were given in."""
    if isinstance(labels, Tensor):
        found = labels.detach().cpu()
        floats = found.dtype.is_floating_point  # NumPy lacks some of torch's
        return (found.double() if floats else found).numpy(), str(labels.dtype).removeprefix("torch.")
    array = np.asarray(labels)
    return array, array.dtype.name


def _type_problem(found: _Array, dtype: str) -> LabelProblem | None:
    """What is wrong with the shape or the type; None for integers of one axis."""
    shape, kind = found.shape, found.dtype.kind
    if len(shape) == 2 and shape[1] > 1 and kind in "iufb" and len(found) and np.isin(found, (0, 1)).all():
        if (found.sum(axis=1) == 1).all():
            return LabelProblem(
                what=f"are one-hot, {dtype} of shape {shape}",
                do="Convert them to class numbers with argmax(1), or name the task multilabel.",
                task="multilabel",
            )
        return LabelProblem(
            what=f"are multi-hot, {dtype} of shape {shape}",
            do="Name the task multilabel; or give one class number per sample.",
            task="multilabel",
        )
    if kind == "f":
        where = np.argwhere(np.isnan(found))
        nan = f" with {len(where)} NaN, first at sample {where[0][0]}" if len(where) and len(shape) else ""
        return LabelProblem(
            what=f"are {dtype}{nan}, which means regression targets",
            do="Convert them to int64 if they are class numbers, or name the task regression.",
            task="regression",
        )
    if kind == "b":
        return LabelProblem(
            what="are bool",
            do="Convert them to int64, for a network with one output for False and one for True.",
        )
    if kind not in "iu":
        return LabelProblem(what=f"are of type {dtype}", do=_TO_CLASS_NUMBERS)
    if len(shape) == 1:
        return None
    if len(shape) == 2 and shape[1] == 1:
        return LabelProblem(what=f"have shape {shape}", do="Flatten them with ravel().")
    return LabelProblem(
        what=f"have shape {shape}",
        do="Give one class number per sample. For several labels per sample there is no top-1 accuracy.",
    )
