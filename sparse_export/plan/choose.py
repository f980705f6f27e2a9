"""Two 0/1 knapsacks: the most saved for a loss, and the least lost for a saving.

Weights are rounded to the disadvantage of the choice, so that it keeps the limit; it can be worse than the
best choice by one part in 10,000 of the limit for each item.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["least_lost", "most_saved"]

_UNITS = 10_000


def most_saved(saved: Sequence[float], lost: Sequence[float], limit: float) -> tuple[int, ...]:
    """Choose the items of largest total `saved` whose total `lost` is at most `limit`.

    Args:
        saved: of each item, at least 0.
        lost: of each item, at least 0.
        limit: at least 0.

    Returns:
        Their indices, ascending.
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
    return _backtrack(taken, units, int(best.argmax()))


def least_lost(saved: Sequence[float], lost: Sequence[float], wanted: float) -> tuple[int, ...] | None:
    """Choose the items of smallest total `lost` whose total `saved` is at least `wanted`.

    Args:
        saved: of each item, at least 0.
        lost: of each item, at least 0.
        wanted: the total to reach.

    Returns:
        Their indices, ascending; None where all items together do not reach it.
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
    return _backtrack(taken, units, _UNITS)


def _ceil(share: float) -> int:
    """A share in units, rounded up; more than all units above 1."""
    return int(np.ceil(share * _UNITS - 1e-9)) if share <= 1.0 else _UNITS + 1


def _backtrack(taken: np.ndarray, units: Sequence[int], at: int) -> tuple[int, ...]:
    """The items of the best choice that ends at a number of units."""
    chosen = []
    for i in reversed(range(len(units))):
        if taken[i, at]:
            chosen.append(i)
            at = max(0, at - units[i])
    return tuple(reversed(chosen))
