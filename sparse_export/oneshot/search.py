"""Finds a large set of layers that passes a test, with few tests: halves of what is left, one after the other.

All layers are tried first. A set that fails is divided, and its first half is tried beside what was accepted so
far, then the second. So the largest passing prefix of the order is found by bisection, and a layer that may not
join is found in log2(n) tests, after which those behind it are tried together. Nothing is added up: each set is
tested as it would ship. Trying the left-out layers one by one gives the same set, in a test for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Found", "largest_passing", "last_passing"]


@dataclass(kw_only=True)
class Found:
    """What a search ended with.

    Attributes:
        chosen: in the order of the search; this set passed, or is empty.
        refused: each layer that made a set fail, and the layers that had been accepted by then.
        untried: layers that no test of their own was left for.
    """

    chosen: tuple[str, ...] = ()
    refused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    untried: tuple[str, ...] = ()


def largest_passing(
    order: Sequence[str],
    saving: Mapping[str, float],
    passes: Callable[[tuple[str, ...]], bool],
    *,
    may_go_on: Callable[[], bool],
) -> Found:
    """Search for a set of layers that passes and saves much.

    Args:
        order: the layers, those first that save most for what they cost.
        saving: of each layer; a set is divided where half of it is reached.
        passes: tests a set, which is given in the order.
        may_go_on: asked before each test but the first.

    Returns:
        A set that passed, and why the others are not in it.
    """
    found = Found()
    known: dict[frozenset[str], bool] = {}

    def passing(names: tuple[str, ...]) -> bool:
        key = frozenset(names)
        if key not in known:
            known[key] = passes(names)
        return known[key]

    def extend(part: Sequence[str]) -> None:
        wanted = (*found.chosen, *part)
        if known and frozenset(wanted) not in known and not may_go_on():
            found.untried = (*found.untried, *part)
            return
        if passing(wanted):
            found.chosen = wanted
            return
        if len(part) == 1:
            found.refused[part[0]] = found.chosen
            return
        middle = _middle(part, saving)
        extend(part[:middle])
        extend(part[middle:])

    if order:
        extend(tuple(order))
    return found


def _middle(part: Sequence[str], saving: Mapping[str, float]) -> int:
    """Where the first part saves half, at least one layer from either end."""
    whole, so_far = sum(saving[name] for name in part), 0.0
    for count, name in enumerate(part[:-1], 1):
        so_far += saving[name]
        if 2 * so_far >= whole:
            return count
    return len(part) - 1


def last_passing(order: Sequence[str], passes: Callable[[tuple[str, ...]], bool]) -> tuple[str, ...]:
    """The longest beginning of an order that passes a test, by bisection.

    Args:
        order: of layers.
        passes: tests a beginning; that longer ones pass less is taken for granted.

    Returns:
        The beginning; () where not even one layer passes.
    """
    if not order or passes(tuple(order)):
        return tuple(order)
    low, high = 0, len(order)  # the last that is known to pass, the first that is known to fail
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if passes(tuple(order[:middle])) else (low, middle)
    return tuple(order[:low])
