"""The samples that a choice of layers is made on: held back from calibration, and from the test set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sparse_export.signature import Array, Feeds, Signature
from sparse_export.tasks.data import own
from sparse_export.tasks.samples import BatchSamples, SampleSet
from sparse_export.tasks.task import Targets, Task

__all__ = ["MOST_HELD", "HeldBack", "held_from", "most_held_of", "of_own_data", "part_of_test"]

MOST_HELD = 2000
"""Samples that layers are chosen on, at most."""

_MOST_VALUES = 2**27  # input values of them that are kept in memory, at most
_LEAST = 64  # samples, where they are there, however large
_SHARE = 5  # one in so many of a test set
_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class HeldBack:
    """Samples that layers are chosen on, in memory, in an order of no meaning.

    Attributes:
        samples: the inputs.
        targets: one for each; None where the outputs of the dense network are what others are held against.
        task: of the targets; None without.
        words: what these are.
    """

    samples: BatchSamples
    targets: Targets | None
    task: Task | None
    words: str

    def __len__(self) -> int:
        return len(self.samples)

    def halves(self) -> tuple[HeldBack, HeldBack]:
        """The samples that a search may see, and those that confirm what it found; one alone is both."""
        if len(self) < 2:
            return self, self
        signature = self.samples.signature
        first: list[Feeds] = []
        second: list[Feeds] = []
        rows: tuple[list[int], list[int]] = [], []
        start = 0
        for at, feeds in enumerate(self.samples.parts):
            n = signature.n_samples(feeds)
            middle = (n + at % 2) // 2 if signature.batch is not None else n * (at % 2)
            for half, numbers, low, high in ((first, rows[0], 0, middle), (second, rows[1], middle, n)):
                if high > low:
                    half.append(signature.part(feeds, low, high) if signature.batch is not None else feeds)
                    numbers.extend(range(start + low, start + high))
            start += n
        if not first or not second:
            return self, self
        return self._of(first, rows[0]), self._of(second, rows[1])

    def _of(self, parts: Sequence[Feeds], rows: Sequence[int]) -> HeldBack:
        samples = BatchSamples(parts=tuple(parts), signature=self.samples.signature)
        return replace(self, samples=samples, targets=_chosen(self.targets, rows))

    def some(self, n: int) -> HeldBack:
        """The first of them, as many as there are whole batches or parts of one for."""
        parts: list[Feeds] = []
        signature, left = self.samples.signature, n
        for feeds in self.samples.parts:
            if left <= 0:
                break
            parts.append(signature.part(feeds, 0, left) if signature.batch is not None else feeds)
            left -= signature.n_samples(parts[-1])
        samples = BatchSamples(parts=tuple(parts), signature=signature)
        targets = None if self.targets is None else self.targets[: len(samples)]
        return HeldBack(samples=samples, targets=targets, task=self.task, words=self.words)


def held_from(
    samples: SampleSet,
    targets: Targets | None,
    task: Task | None,
    signature: Signature,
    rows: Sequence[int],
    *,
    words: str,
    seed: int,
) -> HeldBack:
    """Read samples into memory, shuffled, so that any first part of them is a sample of all.

    Args:
        samples: that they are taken from, read once.
        targets: of all of these; None for none.
        task: of the targets.
        signature: of the network.
        rows: numbers of the samples that are wanted; fewer are taken where they are too large.
        words: what these are.
        seed: of the choice and the order.
    """
    generator = np.random.default_rng(seed)
    chosen = np.asarray(rows)[generator.permutation(len(rows))[: most_held_of(samples.n_values)]]
    place = {int(row): at for at, row in enumerate(chosen)}
    found: list[tuple[int, int, Feeds]] = []
    first = 0
    for feeds in samples.batches(_AT_ONCE):
        n = signature.n_samples(feeds)
        for row in range(first, first + n):
            if row in place:
                found.append((place[row], row, signature.part(feeds, row - first, row - first + 1)))
        first += n
    found.sort(key=lambda one: one[0])
    kept = [row for _, row, _ in found]
    parts = _joined([feeds for _, _, feeds in found], signature)
    return HeldBack(
        samples=BatchSamples(parts=parts, signature=signature),
        targets=_chosen(targets, kept),
        task=task,
        words=words,
    )


def most_held_of(n_values: int) -> int:
    """How many samples of so many input values each may be held in memory."""
    return min(MOST_HELD, max(_LEAST, _MOST_VALUES // max(1, n_values)))


def part_of_test(n: int, seed: int) -> Array:
    """Numbers of the samples of a test set that layers are chosen on, a fifth of it, in order.

    Args:
        n: samples of the test set.
        seed: of the choice.
    """
    n_held = min(MOST_HELD, max(1, n // _SHARE))
    return np.sort(np.random.default_rng(seed).permutation(n)[:n_held])


def of_own_data(name: str, n_calibration: int) -> tuple[own.Part, list[int]]:
    """A part of a user's own data that layers can be chosen on, and the samples of it that are free for that.

    Args:
        name: of the data, with a part `calibration` or `train`.
        n_calibration: samples that weights are calibrated on, evenly spread over that part.

    Returns:
        The validation part, or else the part that is calibrated on without the samples for that; the
        samples by their numbers, none where there are none left.
    """
    data = own.own_data(name)
    if "validation" in data.parts:
        part = data.part("validation")
        return part, _spread(len(part), MOST_HELD)
    part = data.part("calibration", "train")
    used = set(_spread(len(part), n_calibration))
    left = [row for row in range(len(part)) if row not in used]
    return part, [left[at] for at in _spread(len(left), MOST_HELD)]


def _chosen(targets: Any, rows: Sequence[int]) -> Any:
    if targets is None:
        return None
    return targets[list(rows)] if isinstance(targets, np.ndarray) else [targets[row] for row in rows]


def _spread(n: int, most: int) -> list[int]:
    """So many of n numbers, as `sparse_export.tasks.named_data.calibration_of` takes them."""
    return [at * n // min(n, most) for at in range(min(n, most))]


def _joined(single: Sequence[Feeds], signature: Signature) -> tuple[Feeds, ...]:
    """Samples of one shape that follow each other as batches."""
    if signature.batch is None:
        return tuple(single)
    groups: list[list[Feeds]] = []
    for feeds in single:
        if groups and len(groups[-1]) < _AT_ONCE and _shapes(groups[-1][0]) == _shapes(feeds):
            groups[-1].append(feeds)
        else:
            groups.append([feeds])
    result = []
    for group in groups:
        joined = {}
        for one in signature.inputs:
            axis = one.axis(signature.batch)
            arrays = [feeds[one.name] for feeds in group]
            joined[one.name] = arrays[0] if axis is None else np.concatenate(arrays, axis)
        result.append(joined)
    return tuple(result)


def _shapes(feeds: Feeds) -> list[tuple[int, ...]]:
    return [array.shape for array in feeds.values()]
