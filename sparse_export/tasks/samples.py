"""Samples as a network takes them: with labels that were held against its outputs, or without."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from sparse_export.formats.run import DataInfo
from sparse_export.signature import Array, Feeds, Signature
from sparse_export.tasks import data
from sparse_export.tasks.labels import require_labels, require_outputs

__all__ = ["ArraySamples", "BatchSamples", "LabelledSamples", "SampleSet", "SingleInput", "load_test_set"]


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
        inputs: float32 (n, *input_shape); of pictures, those that are asked for are decoded.
    """

    name: str
    inputs: data.Inputs

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def n_values(self) -> int:
        return math.prod(self.inputs.shape[1:])

    def batches(self, most: int) -> Iterator[dict[str, Array]]:
        for start in range(0, len(self.inputs), most):
            yield {self.name: self.inputs[start : start + most]}


@dataclass(frozen=True, kw_only=True)
class LabelledSamples:
    """Samples that a classifier can be scored on.

    Attributes:
        samples: the inputs.
        labels: class numbers (n,).
    """

    samples: SampleSet
    labels: np.ndarray[tuple[int, ...], np.dtype[np.int64]]


def load_test_set(
    info: DataInfo, signature: Signature, data_dir: str | Path | None, *, network: str, do: str
) -> LabelledSamples:
    """Load the test set on record.

    Args:
        info: the data of a run or a bundle.
        signature: of its network.
        data_dir: where the data sets lie.
        network: the network, for the message.
        do: what to do where it has no scores of classes, a sentence.

    Raises:
        UsageError: a network that gives no scores of classes, or one, or labels that are not its class
            numbers.
        DataNotFound: the data are not there.
        ArtefactError: they are not those on record.
        MissingCapability: the library that reads them is not installed.
    """
    n_classes = require_outputs(signature.n_classes, network, do=do)
    inputs, labels = data.load_test_set(info, signature.input_shape, data_dir)
    of = f"the test set of {info.name}"
    known = require_labels(labels, n_samples=len(inputs), n_outputs=n_classes, of=of)
    return LabelledSamples(samples=SingleInput(name=signature.input_names[0], inputs=inputs), labels=known)
