"""A 0/1 knapsack, twice: most saved for a loss, least lost for a saving.

Weights are rounded to the disadvantage of the choice, so what is promised of it is kept; against the best choice it can
miss by one part in 10,000 of the limit for each item.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["least_lost", "most_saved"]

_UNITS = 10_000


def most_saved(saved: Sequence[float], lost: Sequence[float], limit: float) -> tuple[int, ...]:
    """Items of largest total `saved` whose total `lost` is at most `limit`, ascending.

    saved, lost: at least 0.  limit: at least 0.
    """
    if sum(lost) <= limit:
        return tuple(range(len(saved)))
    units = [0 if item == 0 else _UNITS + 1 if limit == 0 else _ceil(item / limit) for item in lost]
    best = np.zeros(_UNITS + 1)
    taken = np.zeros((len(saved), _UNITS + 1), dtype=bool)
    for i, (gain, size) in enumerate(zip(saved, units, strict=True)):
        if size > _UNITS:
            continue
        with_item = np.full(_UNITS + 1, -np.inf)
        with_item[size:] = best[: _UNITS + 1 - size] + gain
        taken[i] = with_item > best
        best = np.maximum(best, with_item)
    return _walked_back(taken, units, int(best.argmax()))


def least_lost(saved: Sequence[float], lost: Sequence[float], wanted: float) -> tuple[int, ...] | None:
    """Items of smallest total `lost` whose total `saved` is at least `wanted`, ascending; None when all do not reach it.

    saved, lost: at least 0.
    """
    if wanted <= 0:
        return ()
    if sum(saved) < wanted:
        return None
    units = [min(_UNITS, int(item / wanted * _UNITS)) for item in saved]
    least = np.full(_UNITS + 1, np.inf)  # the least loss with so many units saved, or more
    least[0] = 0.0
    taken = np.zeros((len(saved), _UNITS + 1), dtype=bool)
    for i, (price, size) in enumerate(zip(lost, units, strict=True)):
        before = np.maximum(np.arange(_UNITS + 1) - size, 0)
        with_item = least[before] + price
        taken[i] = with_item < least
        least = np.minimum(least, with_item)
    if not np.isfinite(least[_UNITS]):  # only rounding stands between all of them and the limit
        return tuple(range(len(saved)))
    return _walked_back(taken, units, _UNITS)


def _ceil(share: float) -> int:
    return int(np.ceil(share * _UNITS - 1e-9)) if share <= 1.0 else _UNITS + 1


def _walked_back(taken: np.ndarray, units: Sequence[int], at: int) -> tuple[int, ...]:
    chosen = []
    for i in reversed(range(len(units))):
        if taken[i, at]:
            chosen.append(i)
            at = max(0, at - units[i])
    return tuple(reversed(chosen))
