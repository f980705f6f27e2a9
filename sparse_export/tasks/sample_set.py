"""Inputs of a network, batch by batch, by the names that it has for them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from sparse_export.signature import Array, Feeds, Signature
from sparse_export.tasks import data
from sparse_export.tasks.data.pictures import Inputs as PictureInputs

__all__ = ["ArraySamples", "BatchSamples", "SampleSet", "SingleInput"]


class SampleSet(Protocol):
    """Inputs of a network, in batches."""

    def __len__(self) -> int: ...

    @property
    def n_values(self) -> int:
        """Numbers in the inputs of one sample."""
        ...

    def batches(self, most: int) -> Iterator[dict[str, Array]]:
        """The inputs by name, in order, at most so many samples at a time."""
        ...


@dataclass(frozen=True, kw_only=True)
class ArraySamples:
    """Arrays in memory.

    Attributes:
        feeds: by the names of the inputs, which they fit.
        signature: of the network.
    """

    feeds: Feeds
    signature: Signature

    def __len__(self) -> int:
        return self.signature.n_samples(self.feeds)

    @property
    def n_values(self) -> int:
        return sum(array.size for array in self.feeds.values()) // max(1, len(self))

    def batches(self, most: int) -> Iterator[dict[str, Array]]:
        if self.signature.batch is None:
            yield dict(self.feeds)
            return
        for start in range(0, len(self), most):
            yield self.signature.part(self.feeds, start, start + most)


@dataclass(frozen=True, kw_only=True)
class BatchSamples:
    """Samples that come in batches, whose free sizes may differ from batch to batch.

    Attributes:
        parts: arrays by the names of the inputs.
        signature: of the network.
    """

    parts: Sequence[Feeds]
    signature: Signature

    def __len__(self) -> int:
        return sum(self.signature.n_samples(feeds) for feeds in self.parts)

    @property
    def n_values(self) -> int:
        return sum(array.size for feeds in self.parts for array in feeds.values()) // max(1, len(self))

    def batches(self, most: int) -> Iterator[dict[str, Array]]:
        for feeds in self.parts:
            yield from ArraySamples(feeds=feeds, signature=self.signature).batches(most)


@dataclass(frozen=True, kw_only=True)
class SingleInput:
    """Samples of a network with one input, along its first axis.

    Attributes:
        name: of the input.
        inputs: (n, *input_shape), normalized float32 or raw; pictures are decoded when they are asked for.
    """

    name: str
    inputs: data.Inputs

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def n_values(self) -> int:
        return math.prod(self.inputs.shape[1:])

    def batches(self, most: int) -> Iterator[dict[str, Array]]:
        if isinstance(self.inputs, PictureInputs):
            yield from ({self.name: batch} for batch in self.inputs.batches(most))
            return
        for start in range(0, len(self.inputs), most):
            yield {self.name: self.inputs[start : start + most]}
