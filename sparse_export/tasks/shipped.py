"""The tasks that come with the program."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from torch import Tensor
from torch.nn import functional

from sparse_export.errors import UnknownNameError, UsageError
from sparse_export.formats.score import ACCURACY, Score
from sparse_export.instruments.paired_scores import (
    ScoreDifference,
    paired_accuracy_difference,
)
from sparse_export.own_code import attribute_named, current_folder_first, kind_of
from sparse_export.signature import Array
from sparse_export.tasks.embeddings import Embedding, SimilarityRanks
from sparse_export.tasks.fitting import class_numbers_text, fitting, not_finite_text
from sparse_export.tasks.labels import correct_predictions, label_problem
from sparse_export.tasks.task import Outputs, Statistics, Targets, Task

__all__ = ["IGNORED", "TASKS", "is_own", "task_named"]

_MASKS = 64  # that are looked at together
_CONSTANT = "are all the same number, of which no share can be explained, so there is no R²"
_ROUNDING = 1e-13  # of sums of squares in float64
IGNORED = 255
"""The class number of pixels that count for nothing, as PASCAL VOC has it."""


def is_own(name: str) -> bool:
    """Is this the name of a user's own task, `package.module:task`? Nothing is imported."""
    return ":" in name and name not in TASKS


def task_named(name: str) -> Task:
    """Make a task by its name. A user's own is imported, from the current folder first.

    Args:
        name: a key of `TASKS`, or `package.module:task`: an object of a class that derives from `Task`, or
            such a class.

    Raises:
        UnknownNameError: there is no such task.
        UsageError: it cannot be imported, or is no task.
    """
    if name in TASKS:
        return TASKS[name]
    if name.partition(":")[0] in {known.partition(":")[0] for known in TASKS} or ":" not in name:
        raise UnknownNameError("task", name, (*TASKS, "package.module:task"))
    with current_folder_first():
        found = attribute_named(name, "task", f"like my_package.tasks:reading, or one of {', '.join(TASKS)}")
        if isinstance(found, type) and issubclass(found, Task):
            found = found()
    if not isinstance(found, Task):
        raise UsageError(
            f"{name} is {kind_of(found)}, not a task.",
            expected="An object of a class that derives from sparse_export.tasks.Task was expected.",
        )
    found.name = name
    return found


class _RightAnswers(Task):
    """A task whose score is the share of right answers, which McNemar's test compares."""

    score_name = ACCURACY
    is_share = True

    def score(self, statistics: Statistics) -> Score:
        return Score(n_correct=int(statistics[:, 0].sum()), n_samples=len(statistics), name=self.score_name)

    def difference(self, a: Statistics, b: Statistics) -> ScoreDifference:
        return paired_accuracy_difference(a[:, 0] > 0, b[:, 0] > 0)


class Classification(_RightAnswers):
    """One class a sample: logits (n, classes), targets class numbers (n,)."""

    output_name = "logits"
    postprocess = ("softmax", "sigmoid", "argmax", "topk")

    def __init__(self, top: int = 1) -> None:
        self.top = top
        self.name = "classification" if top == 1 else f"classification:top{top}"
        self.score_name = ACCURACY if top == 1 else f"top-{top} accuracy"

    def loss(self, outputs: Outputs, targets: Targets) -> Tensor:
        return functional.cross_entropy(outputs, targets)

    def per_sample(self, outputs: Outputs, targets: Targets) -> Array:
        right: Array = correct_predictions(outputs, np.asarray(targets))
        if self.top == 1:
            return right
        own = np.take_along_axis(outputs, np.asarray(targets)[:, np.newaxis], axis=1)
        larger = (outputs > own).sum(1)
        found: Array = (larger < self.top) & np.isfinite(outputs).all(axis=1)
        return found

    def problem(self, targets: Array, n_outputs: int | None) -> str | None:
        n = int(np.max(targets)) + 1 if n_outputs is None and np.issubdtype(targets.dtype, np.integer) else 0
        found = label_problem(targets, n_samples=len(targets), n_classes=n_outputs or max(n, 1))
        if found is None:
            return None
        do = found.do[0].lower() + found.do[1:].rstrip(".")
        other = "" if found.task else fitting(targets)
        return f"{found.what}: {do}{'' if other.endswith('classification') else other}"

    def n_outputs(self, targets: Tensor) -> int | None:
        return int(targets.max()) + 1


class Binary(_RightAnswers):
    """Yes or no by one logit, which is above 0 for yes: outputs (n,) or (n, 1), targets 0 and 1 (n,)."""

    name = "binary"
    output_name = "logits"
    postprocess = ("sigmoid",)

    def loss(self, outputs: Outputs, targets: Targets) -> Tensor:
        return functional.binary_cross_entropy_with_logits(outputs.reshape(-1), targets.reshape(-1).float())

    def per_sample(self, outputs: Outputs, targets: Targets) -> Array:
        found: Array = (_one_number(outputs, self.name) > 0) == (np.asarray(targets).reshape(-1) > 0)
        return found

    def problem(self, targets: Array, n_outputs: int | None) -> str | None:
        if n_outputs not in (None, 1):
            return f"are of yes and no, and the network has {n_outputs} outputs a sample, not one"
        flat = targets.ndim == 1 or (targets.ndim == 2 and targets.shape[1] == 1)
        if flat and targets.dtype.kind in "biuf" and np.isin(targets, (0, 1)).all():
            return None
        return f"are no zeros and ones, one a sample{fitting(targets)}"

    def n_outputs(self, targets: Tensor) -> int | None:
        return 1


class MultiLabel(Task):
    """Any number of labels a sample: logits (n, labels), targets zeros and ones (n, labels)."""

    is_share = True
    output_name = "logits"
    postprocess = ("sigmoid", "topk")

    def loss(self, outputs: Outputs, targets: Targets) -> Tensor:
        return functional.binary_cross_entropy_with_logits(outputs, targets.float())

    def problem(self, targets: Array, n_outputs: int | None) -> str | None:
        if targets.ndim != 2 or targets.dtype.kind not in "biuf" or not np.isin(targets, (0, 1)).all():
            return f"are no zeros and ones of shape (samples, labels){fitting(targets)}"
        if n_outputs is not None and n_outputs != targets.shape[1]:
            return f"have {targets.shape[1]} labels, and the network has {n_outputs} outputs"
        return None

    def n_outputs(self, targets: Tensor) -> int | None:
        return int(targets.shape[1])


class MeanAveragePrecision(MultiLabel):
    """Scored by the mean over the labels of the average precision."""

    name = "multilabel"
    score_name = "mean average precision"

    def per_sample(self, outputs: Outputs, targets: Targets) -> Array:
        return np.concatenate([outputs, np.asarray(targets)], axis=1)

    def over(self, statistics: Statistics) -> float:
        from sklearn.metrics import average_precision_score

        scores, targets = np.split(statistics, 2, axis=1)
        there = targets.any(axis=0)  # a label that no sample has, has no precision
        if not there.any():
            return float("nan")
        return float(average_precision_score(targets[:, there], scores[:, there], average="macro"))

    def resampled(self, statistics: Statistics, counts: Statistics) -> Statistics:
        """As `over`, which is scikit-learn's, with samples sorted once for all sets."""
        scores, targets = np.split(statistics, 2, axis=1)
        precisions = np.full((scores.shape[1], len(counts)), np.nan)
        for label in range(scores.shape[1]):
            order = np.argsort(-scores[:, label], kind="stable")
            ends = np.append(np.diff(scores[order, label]) != 0, True)  # equal scores are one threshold
            n_said = counts[:, order].cumsum(axis=1)[:, ends]
            n_right = (counts[:, order] * targets[order, label]).cumsum(axis=1)[:, ends]
            gained = np.diff(n_right, axis=1, prepend=0.0)
            precision = np.divide(n_right, n_said, out=np.zeros_like(n_right), where=n_said > 0)
            with np.errstate(invalid="ignore"):  # NaN where no sample of the set has the label
                precisions[label] = (gained * precision).sum(axis=1) / n_right[:, -1]
        there = np.isfinite(precisions)
        found: Statistics = np.where(there, precisions, 0.0).sum(axis=0) / there.sum(axis=0)
        return found


class F1(MultiLabel):
    """Scored by F1 over all labels of all samples together, with logits above 0 for yes."""

    name = "multilabel:f1"
    score_name = "F1"
    of_sums = True

    def per_sample(self, outputs: Outputs, targets: Targets) -> Array:
        said, true = outputs > 0, np.asarray(targets) > 0
        return np.stack([(said & true).sum(1), (said & ~true).sum(1), (~said & true).sum(1)], axis=1)

    def over(self, statistics: Statistics) -> float:
        right, wrong, missed = statistics
        return float(2 * right / (2 * right + wrong + missed)) if right + wrong + missed else 1.0


class Regression(Task):
    """Numbers: outputs (n,) or (n, k), targets likewise."""

    of_sums = True
    postprocess = ()

    def loss(self, outputs: Outputs, targets: Targets) -> Tensor:
        x, y = outputs.reshape(len(outputs), -1), targets.reshape(len(targets), -1)
        if x.shape != y.shape:
            raise _other_width(x, y)
        return functional.mse_loss(x, y.float())

    def problem(self, targets: Array, n_outputs: int | None) -> str | None:
        if targets.dtype.kind not in "iuf":
            return "are no numbers"
        not_finite = not_finite_text(targets)
        if not_finite is not None:
            return not_finite
        width = int(np.prod(targets.shape[1:]))
        if n_outputs is not None and n_outputs != width:
            fits = class_numbers_text(targets, n_outputs)
            return f"have {width} numbers a sample, and the network has {n_outputs} outputs{fits}"
        return None

    def n_outputs(self, targets: Tensor) -> int | None:
        return int(targets[0].numel())

    def _both(self, outputs: Outputs, targets: Targets) -> tuple[Array, Array]:
        y = np.asarray(targets, dtype=np.float64).reshape(len(targets), -1)
        x = np.asarray(outputs, dtype=np.float64).reshape(len(outputs), -1)
        if x.shape != y.shape:
            raise _other_width(x, y)
        return x, y


def _other_width(x: Outputs, y: Targets) -> UsageError:
    """The error for a network that gives another count of numbers a sample than there are targets."""
    counts = [f"{len(one)} of shape {tuple(one.shape[1:])}" for one in (x, y)]
    is_single = y.shape[1] == 1 and x.shape[1] > 1
    return UsageError(
        f"The network gives {x.shape[1]} numbers a sample, and the targets have {y.shape[1]} "
        f"({' and '.join(counts)}).",
        do="Give a network of as many outputs as there are targets."
        + (" If the targets are class numbers, name the task classification." if is_single else ""),
    )


class RootMeanSquaredError(Regression):
    """Scored by the root of the mean squared error."""

    name = "regression"
    score_name = "RMSE"
    higher_is_better = False

    def per_sample(self, outputs: Outputs, targets: Targets) -> Array:
        x, y = self._both(outputs, targets)
        return np.stack([np.square(x - y).mean(1), np.ones(len(y))], axis=1)

    def over(self, statistics: Statistics) -> float:
        return float(np.sqrt(statistics[0] / statistics[1]))


class R2(Regression):
    """Scored by the coefficient of determination, over all numbers of a sample together."""

    name = "regression:r2"
    score_name = "R²"

    def problem(self, targets: Array, n_outputs: int | None) -> str | None:
        found = super().problem(targets, n_outputs)
        if found is None and len(targets) and (targets == targets[:1]).all():
            return _CONSTANT
        return found

    def score(self, statistics: Statistics) -> Score:
        if not self._spread(statistics.sum(0)) > 0:
            raise UsageError(
                f"The {len(statistics)} targets {_CONSTANT}.",
                do="Score by the task regression, or on samples whose targets differ.",
            )
        return super().score(statistics)

    def per_sample(self, outputs: Outputs, targets: Targets) -> Array:
        x, y = self._both(outputs, targets)
        one = np.ones((len(y), 1))
        return np.concatenate([np.square(x - y).sum(1)[:, np.newaxis], np.square(y), y, one], axis=1)

    def over(self, statistics: Statistics) -> float:
        spread = self._spread(statistics)
        return float(1 - statistics[0] / spread) if spread > 0 else math.nan

    def _spread(self, statistics: Statistics) -> float:
        """The sum of the squares of the targets about their mean; 0 where they differ by rounding alone."""
        width = (len(statistics) - 2) // 2
        squares, sums, n = statistics[1 : 1 + width], statistics[1 + width : -1], statistics[-1]
        found = float((squares - np.square(sums) / n).sum())
        return found if found > _ROUNDING * float(squares.sum()) else 0.0


class Segmentation(Task):
    """A class for each pixel: logits (n, classes, height, width), targets class numbers (n, height, width).

    Scored by the mean over the classes of intersection over union, of the confusion matrix of all pixels.
    Pixels of the class IGNORED count for nothing. Of several outputs the first is meant.
    """

    name = "segmentation"
    score_name = "mean IoU"
    postprocess = ("softmax", "sigmoid", "argmax", "topk")
    is_share = True
    of_sums = True

    def loss(self, outputs: Outputs, targets: Targets) -> Tensor:
        return functional.cross_entropy(_first(outputs), targets.long(), ignore_index=IGNORED)

    def per_sample(self, outputs: Outputs, targets: Targets) -> Array:
        logits, true = _first(outputs), np.asarray(targets)
        n, n_classes = logits.shape[:2]
        if logits.shape[2:] != true.shape[1:]:
            raise UsageError(
                f"The network gives maps of {logits.shape[2:]}, and the targets have {true.shape[1:]}.",
                expected="A class for each pixel of the outputs was expected.",
                do="Give targets of the size of the outputs.",
            )
        said, counts = logits.argmax(1), np.zeros((n, n_classes**2))
        for row in range(n):
            known = true[row] != IGNORED
            pairs = true[row][known].astype(np.int64) * n_classes + said[row][known]
            counts[row] = np.bincount(pairs, minlength=n_classes**2)
        return counts

    def over(self, statistics: Statistics) -> float:
        n_classes = round(len(statistics) ** 0.5)
        matrix = statistics.reshape(n_classes, n_classes)
        both = np.diag(matrix)
        either = matrix.sum(0) + matrix.sum(1) - both
        return float((both[either > 0] / either[either > 0]).mean())

    def problem(self, targets: Array, n_outputs: int | None) -> str | None:
        if targets.ndim != 3 or targets.dtype.kind not in "iu":
            return f"are no class numbers of shape (samples, height, width){fitting(targets)}"
        return None

    def n_outputs(self, targets: Tensor) -> int | None:
        largest = [one[one != IGNORED].max() for one in targets.split(_MASKS) if bool((one != IGNORED).any())]
        return int(max(largest)) + 1 if largest else None


def _first(outputs: Outputs) -> Outputs:
    return next(iter(outputs.values())) if isinstance(outputs, Mapping) else outputs


def _one_number(outputs: Array, name: str) -> Array:
    if outputs.size != len(outputs):
        raise UsageError(
            f"The network gives outputs of shape {outputs.shape}.",
            expected=f"One number a sample was expected for the task {name}.",
        )
    return outputs.reshape(-1)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Classification(),
        Classification(top=5),
        Binary(),
        MeanAveragePrecision(),
        F1(),
        RootMeanSquaredError(),
        R2(),
        Segmentation(),
        Embedding(),
        SimilarityRanks(),
    )
}
"""Every task that comes with the program, by name. Without labels there is also `agreement`."""
