"""The mask update once more, in plain lists, loops and exact fractions: slow, and plain to see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

NEAR = Fraction(1, 10**9)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer as flat lists of one length."""

    weight: Sequence[float]
    score: Sequence[float]
    mask: Sequence[bool]

    @property
    def n_active(self) -> int:
        return sum(self.mask)

    @property
    def n_free(self) -> int:
        return len(self.mask) - self.n_active


def largest(values: Sequence[float], candidates: Sequence[bool], count: int) -> list[bool]:
    """The `count` candidates that come first when sorted by magnitude, then by index."""
    order = sorted((-abs(value), index) for index, value in enumerate(values) if candidates[index])
    chosen = {index for _, index in order[:count]}
    return [index in chosen for index in range(len(values))]


def statistic(layer: Layer, redistribution: str) -> Fraction:
    if redistribution == "none":
        return Fraction(len(layer.mask))
    if redistribution == "nonzeros":
        return Fraction(layer.n_active)
    values = layer.score if redistribution == "momentum" else layer.weight
    active = [abs(Fraction(value)) for value, kept in zip(values, layer.mask, strict=True) if kept]
    return sum(active, Fraction(0)) / len(active) if active else Fraction(0)


def shares(layers: Sequence[Layer], redistribution: str, rate: float) -> list[Fraction]:
    if redistribution == "own":
        claims = [Fraction(n_removed(layer, rate)) for layer in layers]
    elif redistribution == "survivors":
        claims = [Fraction(max(layer.n_active - n_removed(layer, rate), 1)) for layer in layers]
    else:
        claims = [statistic(layer, redistribution) for layer in layers]
    if sum(claims) == 0:
        claims = [Fraction(layer.n_active) for layer in layers]
    if sum(claims) == 0:
        claims = [Fraction(1) for _ in layers]
    return [claim / sum(claims) for claim in claims]


def is_crowded(layer: Layer) -> bool:
    """Whether less than a fifth of the layer is free."""
    return 5 * layer.n_free < len(layer.mask)


def spared_rate(layer: Layer, rate: float) -> float:
    return min(layer.n_free / len(layer.mask), rate)


def prune_rates(
    layers: Sequence[Layer], share: Sequence[Fraction], rate: float, redistribution: str
) -> list[float]:
    if redistribution in ("own", "survivors"):
        return [rate] * len(layers)
    average = Fraction(1, len(layers))
    return [
        spared_rate(layer, rate) if is_crowded(layer) and p > average else rate
        for layer, p in zip(layers, share, strict=True)
    ]


def n_removed(layer: Layer, rate: float) -> int:
    return min(math.ceil(rate * layer.n_active), layer.n_active)


def ideal_budgets(share: Sequence[Fraction], total: int, capacity: Sequence[int]) -> list[Fraction]:
    """Hand out by share, cut what does not fit, hand the cuttings out equally to whoever has room, and
    again.
    """
    budgets = [p * total for p in share]
    while True:
        excess = sum((max(b - c, Fraction(0)) for b, c in zip(budgets, capacity, strict=True)), Fraction(0))
        budgets = [min(b, Fraction(c)) for b, c in zip(budgets, capacity, strict=True)]
        if excess == 0:
            return budgets
        with_room = [n for n, b in enumerate(budgets) if b < capacity[n]]
        for n in with_room:
            budgets[n] += excess / len(with_room)


def whole_budgets(ideal: Sequence[Fraction], total: int) -> tuple[list[int], bool]:
    """Round by largest remainder; and say whether the last one given and the first refused are nearly
    equal.
    """
    budgets = [math.floor(b) for b in ideal]
    remainder = [b - math.floor(b) for b in ideal]
    order = sorted(range(len(ideal)), key=lambda n: (-remainder[n], n))
    n_left = total - sum(budgets)
    for n in order[:n_left]:
        budgets[n] += 1
    is_tie = 0 < n_left < len(order) and remainder[order[n_left - 1]] - remainder[order[n_left]] < NEAR
    return budgets, is_tie
