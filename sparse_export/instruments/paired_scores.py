"""Paired differences of two scores on the same samples, with intervals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr, ndtri

from sparse_export.errors import UsageError
from sparse_export.instruments.statistics import mean_interval

__all__ = [
    "BUDGET_S",
    "N_RESAMPLES",
    "ScoreDifference",
    "mcnemar_p",
    "paired_accuracy_difference",
    "paired_bootstrap_difference",
    "paired_mean_difference",
]

N_RESAMPLES = 10_000
BUDGET_S = 60.0
_SEED = 20
_CHUNK_VALUES = 2**24  # of resampled statistics at once
_AT_ONCE = 100  # resamples
_FEWEST = 200  # resamples, however long they take


@dataclass(frozen=True, kw_only=True)
class ScoreDifference:
    """Score of b minus score of a on the same samples, in the unit that it is shown in.

    Attributes:
        amount: the difference; of shares in percentage points.
        low: end of its interval.
        high: end of its interval.
        n_samples: number of samples.
        n_only_a: of right answers, samples that only a has right; None of other scores.
        n_only_b: likewise of b.
        mcnemar_p: of right answers, probability of a split of these at least as unequal by chance.
        n_resamples: of a bootstrap, how often samples were drawn anew; None where none was needed.
    """

    amount: float
    low: float
    high: float
    n_samples: int
    n_only_a: int | None = None
    n_only_b: int | None = None
    mcnemar_p: float | None = None
    n_resamples: int | None = None


def paired_mean_difference(a: np.ndarray, b: np.ndarray, *, scale: float = 1.0) -> ScoreDifference:
    """Estimate the mean of b minus the mean of a over the same samples, with the Student t interval.

    Args:
        a: float, (n_samples,).
        b: likewise, in the same order.
        scale: of the result, 100 for percentage points.

    Raises:
        UsageError: unequal shapes, or no samples.
    """
    _require_paired(a, b)
    found = mean_interval([float(one) for one in scale * (b - a)])
    half = found.half_width or 0.0
    return ScoreDifference(
        amount=found.mean, low=found.mean - half, high=found.mean + half, n_samples=found.n
    )


def paired_bootstrap_difference(
    scores: Callable[[np.ndarray, np.ndarray], np.ndarray],
    a: np.ndarray,
    b: np.ndarray,
    *,
    scale: float = 1.0,
    n_resamples: int = N_RESAMPLES,
    budget_s: float = BUDGET_S,
    confidence: float = 0.95,
) -> ScoreDifference:
    """Estimate score(b) - score(a) with the percentile interval of a paired bootstrap over samples.

    Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13. Samples are drawn anew with
    replacement, the same ones for both, always by the same seed.

    Args:
        scores: of statistics of samples (n, k) and how often each counts (m, n), the m scores.
        a: statistics of a's samples, (n_samples, k).
        b: likewise of b, in the same order.
        scale: of the result, 100 for percentage points.
        n_resamples: how often samples are drawn.
        budget_s: seconds after which no more are drawn.
        confidence: of the interval, between 0 and 1.

    Returns:
        The difference; n_resamples says how many resamples had a score. Those without one, as a resample
        without any sample of a class, are left out.

    Raises:
        UsageError: unequal shapes, or no samples.
    """
    _require_paired(a, b)
    n = len(a)
    generator = np.random.default_rng(_SEED)
    found: list[np.ndarray] = []
    n_drawn, began = 0, time.monotonic()
    at_once = max(1, min(_AT_ONCE, _CHUNK_VALUES // n))
    with np.errstate(all="ignore"):
        while n_drawn < n_resamples and (n_drawn < _FEWEST or time.monotonic() - began < budget_s):
            counts = _counts(generator.integers(0, n, (min(at_once, n_resamples - n_drawn), n)), n)
            n_drawn += len(counts)
            found.append(scores(b, counts) - scores(a, counts))
        once = np.ones((1, n))
        amount = float((scores(b, once) - scores(a, once))[0])
    apart = np.concatenate(found)
    apart = apart[np.isfinite(apart)]
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(apart, [tail, 100.0 - tail]) if len(apart) else (-math.inf, math.inf)
    return ScoreDifference(
        amount=scale * amount,
        low=scale * float(low),
        high=scale * float(high),
        n_samples=n,
        n_resamples=len(apart),
    )


def _counts(rows: np.ndarray, n: int) -> np.ndarray:
    """How often each of n samples was drawn in each of the rows, float64 (rows, n)."""
    shifted = rows + n * np.arange(len(rows))[:, np.newaxis]
    found: np.ndarray = np.bincount(shifted.ravel(), minlength=n * len(rows)).reshape(len(rows), n)
    return found.astype(np.float64)


def _require_paired(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape or len(a) == 0:
        raise UsageError(
            f"A paired difference of scores of shapes {a.shape} and {b.shape} is not over the same samples.",
            do="Run both networks on the same test set.",
        )


def paired_accuracy_difference(
    correct_a: np.ndarray, correct_b: np.ndarray, *, confidence: float = 0.95
) -> ScoreDifference:
    """Estimate the accuracy of b minus the accuracy of a on the same samples.

    The interval is Wald's with half a sample added to each of the four cells, from Agresti and Min, "Simple
    improved confidence intervals for comparing matched proportions", Statistics in Medicine 24, 2005: unlike
    Wald's own it does not collapse to a point when the two never disagree.

    Args:
        correct_a: bool, (n_samples,), is the prediction of a correct?
        correct_b: likewise of b, in the same order.
        confidence: of the interval, between 0 and 1.

    Raises:
        UsageError: unequal shapes, or no samples.
    """
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    if a.shape != b.shape or a.ndim != 1 or a.size == 0:
        raise UsageError(
            f"A paired accuracy difference of shapes {a.shape} and {b.shape} is not over the same samples.",
            do="Run both networks on the same test set.",
        )
    n, only_a, only_b = a.size, int((a & ~b).sum()), int((b & ~a).sum())
    n_adjusted, a_adjusted, b_adjusted = n + 2.0, only_a + 0.5, only_b + 0.5
    difference = (b_adjusted - a_adjusted) / n_adjusted
    error = math.sqrt(a_adjusted + b_adjusted - (b_adjusted - a_adjusted) ** 2 / n_adjusted) / n_adjusted
    reach = float(ndtri(0.5 * (1.0 + confidence))) * error
    return ScoreDifference(
        amount=100.0 * (only_b - only_a) / n,
        low=100.0 * max(-1.0, difference - reach),
        high=100.0 * min(1.0, difference + reach),
        n_samples=n,
        n_only_a=only_a,
        n_only_b=only_b,
        mcnemar_p=mcnemar_p(only_a, only_b),
    )


def mcnemar_p(n_only_a: int, n_only_b: int) -> float:
    """Compute the two-sided p-value of McNemar's exact test.

    McNemar, "Note on the sampling error of the difference between correlated proportions", Psychometrika 12,
    1947, with the binomial distribution in place of its approximation.

    Args:
        n_only_a: samples that only a predicts correctly.
        n_only_b: samples that only b predicts correctly.

    Returns:
        The p-value, 1 when the two never disagree.
    """
    n = n_only_a + n_only_b
    return min(1.0, 2.0 * float(bdtr(min(n_only_a, n_only_b), n, 0.5))) if n else 1.0
