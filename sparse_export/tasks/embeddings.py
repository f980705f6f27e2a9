"""The tasks whose outputs are vectors: embeddings."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor
from torch.nn import functional

from sparse_export.errors import UsageError
from sparse_export.formats.score import Score
from sparse_export.instruments.paired_scores import ScoreDifference, paired_bootstrap_difference
from sparse_export.instruments.rank_correlation import rank_correlations
from sparse_export.signature import Array
from sparse_export.tasks.fitting import fitting, not_finite_text
from sparse_export.tasks.task import Outputs, Statistics, Targets, Task

__all__ = ["Embedding", "SimilarityRanks"]


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
            return f"are no vectors of shape (samples, size){fitting(targets)}"
        not_finite = not_finite_text(targets)
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
            return f"are no pair numbers and scores of shape (samples, 2){fitting(targets)}"
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
