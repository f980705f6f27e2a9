"""The tasks that come with the program."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor
from torch.nn import functional

from sparse_export.errors import UnknownNameError, UsageError
from sparse_export.formats.score import ACCURACY, Score
from sparse_export.instruments.paired_scores import (
    ScoreDifference,
    paired_accuracy_difference,
    paired_bootstrap_difference,
)
from sparse_export.instruments.rank_correlation import rank_correlations
from sparse_export.own_code import attribute_named, current_folder_first, kind_of
from sparse_export.signature import Array
from sparse_export.tasks.labels import correct_predictions, label_problem
from sparse_export.tasks.task import Outputs, Statistics, Targets, Task

__all__ = ["IGNORED", "TASKS", "is_own", "task_named"]

_MASKS = 64  # that are looked at together
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
        return None if found is None else f"{found.what}; {found.do}{_fitting(targets)}"

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
        return f"are no zeros and ones, one a sample{_fitting(targets)}"

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
            return f"are no zeros and ones of shape (samples, labels){_fitting(targets)}"
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
        return functional.mse_loss(
            outputs.reshape(len(outputs), -1), targets.reshape(len(targets), -1).float()
        )

    def problem(self, targets: Array, n_outputs: int | None) -> str | None:
        if targets.dtype.kind not in "iuf":
            return "are no numbers"
        not_finite = _not_finite(targets)
        if not_finite is not None:
            return not_finite
        width = int(np.prod(targets.shape[1:]))
        if n_outputs is not None and n_outputs != width:
            return f"have {width} numbers a sample, and the network has {n_outputs} outputs"
        return None

    def n_outputs(self, targets: Tensor) -> int | None:
        return int(targets[0].numel())

    def _both(self, outputs: Outputs, targets: Targets) -> tuple[Array, Array]:
        y = np.asarray(targets, dtype=np.float64).reshape(len(targets), -1)
        x = np.asarray(outputs, dtype=np.float64).reshape(len(outputs), -1)
        if x.shape != y.shape:
            raise UsageError(
                f"The network gives {x.shape[1]} numbers for each of {len(x)} samples, and there are "
                f"{y.shape[1]} targets for each of {len(y)}.",
                expected="As many of each were expected.",
            )
        return x, y


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

    def per_sample(self, outputs: Outputs, targets: Targets) -> Array:
        x, y = self._both(outputs, targets)
        one = np.ones((len(y), 1))
        return np.concatenate([np.square(x - y).sum(1)[:, np.newaxis], np.square(y), y, one], axis=1)

    def over(self, statistics: Statistics) -> float:
        width = (len(statistics) - 2) // 2
        squares, sums, n = statistics[1 : 1 + width], statistics[1 + width : -1], statistics[-1]
        return float(1 - statistics[0] / (squares - np.square(sums) / n).sum())


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
            return f"are no class numbers of shape (samples, height, width){_fitting(targets)}"
        return None

    def n_outputs(self, targets: Tensor) -> int | None:
        largest = [one[one != IGNORED].max() for one in targets.split(_MASKS) if bool((one != IGNORED).any())]
        return int(max(largest)) + 1 if largest else None


class Embedding(Task):
    """A vector a sample: outputs (n, size), targets the reference vectors (n, size). Scored by the cosine.

    Of several outputs the first one of floats with the shape of the targets is meant.
    """

    name = "embedding"
    postprocess = ()
    score_name = "mean cosine"
    is_share = True

    def loss(self, outputs: Outputs, targets: Targets) -> Tensor:
        vectors = _vectors(outputs, self.name, int(targets.shape[1]))
        return 1 - functional.cosine_similarity(vectors, targets.float()).mean()

    def per_sample(self, outputs: Outputs, targets: Targets) -> Array:
        b = np.asarray(targets, dtype=np.float64)
        return _cosines(np.asarray(_vectors(outputs, self.name, b.shape[1]), dtype=np.float64), b)

    def problem(self, targets: Array, n_outputs: int | None) -> str | None:
        if targets.ndim != 2 or targets.dtype.kind != "f":
            return f"are no vectors of shape (samples, size){_fitting(targets)}"
        not_finite = _not_finite(targets)
        if not_finite is not None:
            return not_finite
        if n_outputs is not None and n_outputs != targets.shape[1]:
            return f"are vectors of {targets.shape[1]}, and the network gives {n_outputs} numbers"
        return None

    def n_outputs(self, targets: Tensor) -> int | None:
        return int(targets.shape[1])


class SimilarityRanks(Task):
    """A vector a sample, and pairs of samples that somebody scored: targets (n, 2), number of pair and score.

    Scored by Spearman's rank correlation, over the pairs, of the scores with the cosines of the two vectors.
    The two samples of a pair stand anywhere, each with the pair's number and score. Of several outputs the
    first one of floats with the shape (n, size) is meant.
    """

    name = "embedding:spearman"
    scores_pairs = True
    postprocess = ()
    score_name = "Spearman correlation"

    def loss(self, outputs: Outputs, targets: Targets) -> Tensor:
        raise UsageError(
            f"The task {self.name} has no loss: the two samples of a pair are in different batches.",
            do="Train with the task embedding, towards reference vectors, or with a task of your own.",
        )

    def per_sample(self, outputs: Outputs, targets: Targets) -> Array:
        vectors = np.asarray(_vectors(outputs, self.name), dtype=np.float64)
        return np.concatenate([vectors, np.asarray(targets, dtype=np.float64)], axis=1)

    def over(self, statistics: Statistics) -> float:
        return float(rank_correlations(_pairs(statistics))[0])

    def score(self, statistics: Statistics) -> Score:
        pairs = _pairs(statistics)
        return self._score(float(rank_correlations(pairs)[0]), len(pairs))

    def difference(self, a: Statistics, b: Statistics) -> ScoreDifference:
        """With a bootstrap over the pairs."""
        return paired_bootstrap_difference(rank_correlations, _pairs(a), _pairs(b))

    def problem(self, targets: Array, n_outputs: int | None) -> str | None:
        if targets.ndim != 2 or targets.shape[1] != 2 or targets.dtype.kind not in "iuf":
            return f"are no pair numbers and scores of shape (samples, 2){_fitting(targets)}"
        if not np.isfinite(targets).all():
            return "are no finite numbers"
        pairs, first, counts = np.unique(targets[:, 0], return_index=True, return_counts=True)
        odd = counts != 2
        if odd.any():
            return f"have the pair {pairs[odd][0]:g} for {counts[odd][0]} samples, not for two"
        scores = targets[first, 1][np.searchsorted(pairs, targets[:, 0])]
        if (scores != targets[:, 1]).any():
            return f"give two scores to the pair {targets[scores != targets[:, 1], 0][0]:g}"
        return "give all pairs one score, so that none ranks higher" if np.ptp(scores) == 0 else None


def _vectors(outputs: Outputs, task: str, size: int | None = None) -> Outputs:
    """The output that holds a vector for each sample."""
    if not isinstance(outputs, Mapping):
        outputs = {"": outputs}
    for one in outputs.values():
        is_float = one.is_floating_point() if isinstance(one, Tensor) else one.dtype.kind == "f"
        if is_float and one.ndim == 2 and size in (None, one.shape[1]):
            return one
    shapes = ", ".join(str(tuple(one.shape)) for one in outputs.values())
    raise UsageError(
        f"The network gives outputs of shapes {shapes}.",
        expected=f"An output of floats (samples, {size or 'size'}) was expected for the task {task}.",
    )


def _cosines(a: Array, b: Array) -> Array:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    found: Array = np.divide((a * b).sum(1), norms, out=np.zeros(len(a)), where=norms > 0)
    return found.clip(-1.0, 1.0)


def _pairs(statistics: Statistics) -> Statistics:
    """Cosine and score of each pair, (pairs, 2), of vectors with pair numbers and scores; in order of number.

    A sample whose other one is not there is left out.
    """
    pairs, counts = np.unique(statistics[:, -2], return_counts=True)
    whole = statistics[np.isin(statistics[:, -2], pairs[counts == 2])]
    both = whole[np.argsort(whole[:, -2], kind="stable")]
    first, second = both[::2], both[1::2]
    return np.stack([_cosines(first[:, :-2], second[:, :-2]), first[:, -1]], axis=1)


def _first(outputs: Outputs) -> Outputs:
    return next(iter(outputs.values())) if isinstance(outputs, Mapping) else outputs


def _not_finite(targets: Array) -> str | None:
    """How many targets are NaN or infinite, and the first, as the end of a sentence; None where none is."""
    wrong = np.argwhere(~np.isfinite(targets))
    if not len(wrong):
        return None
    first = int(wrong[0][0]) if targets.ndim == 1 else tuple(map(int, wrong[0]))
    return f"hold {len(wrong)} that are NaN or infinite, the first at {first}"


def _one_number(outputs: Array, name: str) -> Array:
    if outputs.size != len(outputs):
        raise UsageError(
            f"The network gives outputs of shape {outputs.shape}.",
            expected=f"One number a sample was expected for the task {name}.",
        )
    return outputs.reshape(-1)


def _fitting(targets: Array) -> str:
    """Name the task that targets look like, as the end of a sentence; empty where none is."""
    for task in (Binary(), MeanAveragePrecision(), Segmentation(), RootMeanSquaredError()):
        kind_fits = targets.dtype.kind == "f" or not isinstance(task, RootMeanSquaredError)
        if kind_fits and _fits(task, targets):
            return f". They fit the task {task.name}"
    return ""


def _fits(task: Task, targets: Array) -> bool:
    if isinstance(task, Binary):
        flat = targets.ndim == 1 or (targets.ndim == 2 and targets.shape[1] == 1)
        return bool(flat and targets.dtype.kind in "bf" and np.isin(targets, (0, 1)).all())
    if isinstance(task, MultiLabel):
        many = targets.ndim == 2 and targets.dtype.kind in "biuf" and np.isin(targets, (0, 1)).all()
        return bool(many and (targets.sum(axis=1) != 1).any())
    if isinstance(task, Segmentation):
        return targets.ndim == 3 and targets.dtype.kind in "iu"
    return targets.ndim <= 2 and bool(np.isfinite(targets).all())


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
