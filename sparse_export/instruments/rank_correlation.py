"""Spearman's rank correlation, of many resampled sets at once."""

from __future__ import annotations

import numpy as np

__all__ = ["rank_correlations"]

_Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def rank_correlations(pairs: _Floats, counts: _Floats | None = None) -> _Floats:
    """Spearman's correlation of two columns, in sets in which rows stand several times, or not at all.

    Spearman, "The proof and measurement of association between two things", American Journal of Psychology
    15, 1904: Pearson's correlation of the ranks, equal values having the mean of theirs.

    Args:
        pairs: (n, 2).
        counts: how often each row stands in each of m sets, (m, n); None for once in one set.

    Returns:
        (m,); 0 where all values of the first column are equal and so rank nothing, NaN where all of the
        second are.
    """
    counts = np.ones((1, len(pairs))) if counts is None else counts
    n = counts.sum(axis=1, keepdims=True)
    x, y = (_ranks(column, counts) - (n + 1) / 2 for column in pairs.T)
    both = (counts * x * y).sum(axis=1)
    spread_x, spread_y = ((counts * np.square(one)).sum(axis=1) for one in (x, y))
    with np.errstate(invalid="ignore"):
        return np.where(spread_x > 0, both / np.sqrt(np.where(spread_x > 0, spread_x, 1) * spread_y), 0.0)


def _ranks(values: _Floats, counts: _Floats) -> _Floats:
    """The rank of each value in each set, from 1, (m, n); equal values have the mean of theirs."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(values[order]) != 0))
    of_equal = np.add.reduceat(counts[:, order], starts, axis=1)
    ranks = of_equal.cumsum(axis=1) - (of_equal - 1) / 2
    group = np.empty(len(values), dtype=np.int64)
    group[order] = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(values))))
    return ranks[:, group]
