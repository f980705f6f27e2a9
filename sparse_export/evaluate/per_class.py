"""How many samples of each class two networks get right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparse_export.evaluate.evaluator import Scored
from sparse_export.instruments.paired_scores import ScoreDifference, paired_accuracy_difference
from sparse_export.tasks.samples import LabelledSamples
from sparse_export.tasks.shipped import Classification

__all__ = ["ClassRecall", "losses_first", "recall_per_class"]


@dataclass(frozen=True, kw_only=True)
class ClassRecall:
    """The recall of a class: of its samples, those that a network gets right.

    Attributes:
        number: of the class.
        name: likewise; its number where classes have no names.
        n_samples: of the class.
        dense_percent, sparse_percent: recall.
        difference: sparse minus dense, with the paired 95 % interval of this class alone.
    """

    number: int
    name: str
    n_samples: int
    dense_percent: float
    sparse_percent: float
    difference: ScoreDifference


def recall_per_class(
    dense: Scored, sparse: Scored, samples: LabelledSamples, names: Sequence[str] = ()
) -> tuple[ClassRecall, ...]:
    """Compare the recall of two networks, class by class.

    Args:
        dense: scored on samples.
        sparse: likewise.
        samples: with a class number each; of another task there is nothing to compare.
        names: of the classes, by number; () where they have none.

    Returns:
        The classes that have samples, by number.
    """
    if not isinstance(samples.task, Classification):
        return ()
    targets = np.asarray(samples.targets)
    right = [one.statistics[:, 0] > 0.5 for one in (dense, sparse)]
    found = []
    for number in np.unique(targets):
        of_class = targets == number
        of_dense, of_sparse = (one[of_class] for one in right)
        found.append(
            ClassRecall(
                number=int(number),
                name=names[number] if number < len(names) else str(number),
                n_samples=int(of_class.sum()),
                dense_percent=100.0 * float(of_dense.mean()),
                sparse_percent=100.0 * float(of_sparse.mean()),
                difference=paired_accuracy_difference(of_dense, of_sparse),
            )
        )
    return tuple(found)


def losses_first(classes: Sequence[ClassRecall]) -> list[ClassRecall]:
    """Sort classes: those that lose most first, of equal ones by number."""
    return sorted(classes, key=lambda one: (one.difference.amount, one.number))
