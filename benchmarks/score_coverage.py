"""How often the 95 % interval of a difference of two scores holds the true difference, by simulation.

    python -m benchmarks.score_coverage [--sets N] [--json FILE]

Two networks with known faults are drawn on test sets of several sizes; the true difference is that on a set
of 200,000 samples. Each set is scored by the task itself, as `validate` does. Needs no data and no GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sparse_export.instruments.paired_scores import ScoreDifference, paired_bootstrap_difference
from sparse_export.signature import Array
from sparse_export.tasks import task_named
from sparse_export.tasks.task import Statistics, Task
from sparse_export.version import library_versions, now

SIZES = (50, 200, 1000)
TRUE_SAMPLES = 200_000
N_RESAMPLES = 1000
N_CLASSES = 4
Drawn = tuple[Array, Array, Array]
"""Outputs of the one network, of the other, and targets."""


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Of one score at one size of the test set.

    Attributes:
        share: of the sets, whose interval holds the true difference.
        error: standard error of that share.
        true: the difference that was to be held, in the score's own unit.
        width: mean width of the intervals.
    """

    task: str
    n_samples: int
    n_sets: int
    share: float
    error: float
    true: float
    width: float


def _classes(generator: np.random.Generator, n: int) -> Drawn:
    labels = generator.integers(0, 10, n)
    one = generator.standard_normal((n, 10)) + 4 * np.eye(10)[labels]
    return one, one + 0.5 * generator.standard_normal((n, 10)), labels


def _numbers(generator: np.random.Generator, n: int) -> Drawn:
    targets = generator.standard_normal((n, 1))
    noise = generator.standard_t(5, (n, 1))  # with outliers
    return targets + noise, targets + 1.05 * noise + 0.3 * generator.standard_normal((n, 1)), targets


def _pictures(generator: np.random.Generator, n: int) -> Drawn:
    """Maps of 6 x 6 whose samples are of unlike difficulty; the last class is rare."""
    classes = generator.choice(N_CLASSES, (n, 6, 6), p=(0.5, 0.3, 0.15, 0.05))
    size = 2 * generator.gamma(2.0, 0.5, (n, 1, 1, 1))
    one = np.moveaxis(np.eye(N_CLASSES)[classes], 3, 1) + size * generator.standard_normal(
        (n, N_CLASSES, 6, 6)
    )
    return one, one + 0.3 * generator.standard_normal(one.shape), classes


def _labels(generator: np.random.Generator, n: int) -> Drawn:
    targets = (generator.random((n, 5)) < (0.5, 0.4, 0.3, 0.2, 0.1)).astype(np.int64)
    one = 1.5 * targets + generator.standard_normal((n, 5))
    return one, one + 0.4 * generator.standard_normal((n, 5)), targets


DRAWN: dict[str, Callable[[np.random.Generator, int], Drawn]] = {
    "classification": _classes,
    "regression": _numbers,
    "segmentation": _pictures,
    "multilabel": _labels,  # average precision is the score of detection too
}


def coverage(task: str, n_samples: int, n_sets: int) -> Coverage:
    """Draw sets, and count the intervals that hold the true difference."""
    known = task_named(task)
    true = known_difference(task)
    held, widths = 0, []
    for seed in range(n_sets):
        found = _difference(known, *_statistics(task, np.random.default_rng([seed, n_samples]), n_samples))
        held += found.low <= true <= found.high
        widths.append(found.high - found.low)
    share = held / n_sets
    return Coverage(
        task=task,
        n_samples=n_samples,
        n_sets=n_sets,
        share=share,
        error=float(np.sqrt(share * (1 - share) / n_sets)),
        true=true,
        width=float(np.mean(widths)),
    )


def known_difference(task: str) -> float:
    """The difference on a set so large that its own error does not matter."""
    known = task_named(task)
    a, b = _statistics(task, np.random.default_rng(10**6), TRUE_SAMPLES)
    return known.score(b).figure - known.score(a).figure


def _difference(task: Task, a: Statistics, b: Statistics) -> ScoreDifference:
    """As `task.difference`, with fewer resamples where there are any."""
    if task.is_mean or task.name == "classification":
        return task.difference(a, b)
    scale = 100.0 if task.is_share else 1.0
    return paired_bootstrap_difference(task.resampled, a, b, scale=scale, n_resamples=N_RESAMPLES)


def _statistics(task: str, generator: np.random.Generator, n: int) -> tuple[Statistics, Statistics]:
    known, (one, other, targets) = task_named(task), DRAWN[task](generator, n)
    return known.statistics({"y": one}, targets), known.statistics({"y": other}, targets)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    words = parser.parse_args()
    rows = []
    for task in DRAWN:
        for n in SIZES:
            rows.append(coverage(task, n, words.sets))
            one = rows[-1]
            print(
                f"{task:16} {n:5} samples: {100 * one.share:.1f} % +- {100 * one.error:.1f}, width {one.width:.3g}"
            )
    if words.json:
        document = {
            "versions": library_versions(),
            "created": now(),
            "n_resamples": N_RESAMPLES,
            "rows": [asdict(one) for one in rows],
        }
        words.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
