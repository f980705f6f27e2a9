"""Samples as a network takes them: with labels that were held against its outputs, or without."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from sparse_export.errors import ArtefactError, DataNotFound, UsageError
from sparse_export.formats.run import DataInfo
from sparse_export.signature import Array, Feeds, Signature, TensorInfo, numpy_dtype
from sparse_export.tasks import data
from sparse_export.tasks.data import own
from sparse_export.tasks.inputs import INPUTS_BATCH
from sparse_export.tasks.labels import require_labels, require_outputs
from sparse_export.tasks.shipped import Classification
from sparse_export.tasks.task import Targets, Task

__all__ = [
    "TARGETS",
    "ArraySamples",
    "BatchSamples",
    "LabelledSamples",
    "SampleSet",
    "SingleInput",
    "calibration_of",
    "labelled",
    "load_test_set",
    "n_outputs_of",
    "named_data_info",
    "named_samples",
]


TARGETS = "targets"
"""The array of an archive that is no input."""


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
    """Samples that a network can be scored on.

    Attributes:
        samples: the inputs.
        targets: one a sample, in their order: an array, or a list in a task of a user's own.
        task: what the network is for.
    """

    samples: SampleSet
    targets: Targets
    task: Task


def labelled(
    samples: SampleSet, targets: Targets, task: Task, signature: Signature, *, of: str, network: str, do: str
) -> LabelledSamples:
    """Check targets against a task and a network.

    Args:
        samples: the inputs.
        targets: one for each of them.
        task: what the network is for.
        signature: of the network.
        of: what the targets belong to, for the message.
        network: for the message.
        do: what to do where the network does not fit, a sentence.

    Raises:
        UsageError: the network gives no such outputs, or the targets are not those of the task.
    """
    if isinstance(task, Classification):
        n_classes = require_outputs(signature.n_classes, network, do=do)
        known = require_labels(targets, n_samples=len(samples), n_outputs=n_classes, of=of)
        return LabelledSamples(samples=samples, targets=known, task=task)
    if len(targets) != len(samples) or not len(targets):
        raise UsageError(
            f"There are {len(targets)} targets for {len(samples)} samples of {of}.",
            do="Give one target for each sample, and one sample at least.",
        )
    if isinstance(targets, Tensor):
        targets = targets.detach().cpu().numpy()
    if isinstance(targets, np.ndarray):
        problem = task.problem(targets, n_outputs_of(signature))
        if problem is not None:
            raise UsageError(
                f"The targets of {of} {problem}.",
                do=f"Give targets of the task {task.name}, or another task.",
            )
    return LabelledSamples(samples=samples, targets=targets, task=task)


def n_outputs_of(signature: Signature) -> int | None:
    """Numbers a sample of a network whose only output is (samples, numbers); None of others."""
    if len(signature.outputs) != 1 or len(signature.outputs[0].shape) != 2:
        return None
    size = signature.outputs[0].shape[1]
    return size if isinstance(size, int) else None


def load_test_set(
    info: DataInfo,
    signature: Signature,
    data_dir: str | Path | None,
    *,
    task: Task,
    network: str,
    do: str,
) -> LabelledSamples:
    """Load the test set on record.

    Args:
        info: the data of a run or a bundle.
        signature: of its network.
        data_dir: where the data sets lie.
        task: that it was trained for.
        network: the network, for the message.
        do: what to do where it does not fit the task, a sentence.

    Raises:
        UsageError: a network or targets that do not fit the task.
        DataNotFound: the data are not there.
        ArtefactError: they are not those on record.
        MissingCapability: the library that reads them is not installed.
    """
    if isinstance(task, Classification):  # before the data are read
        require_outputs(signature.n_classes, network, do=do)
    of = f"the test set of {info.name}"
    if not info.mean:  # nothing is normalised: the arrays are the inputs
        named, targets = named_samples(info.name, signature, data_dir)
        data.require_digest(info, _digest(info.name, named, targets))
        return labelled(named, targets, task, signature, of=of, network=network, do=do)
    inputs, targets = data.load_test_set(
        info, signature.input_shape, data_dir, classes=isinstance(task, Classification)
    )
    samples = SingleInput(name=signature.input_names[0], inputs=inputs)
    return labelled(samples, targets, task, signature, of=of, network=network, do=do)


def named_samples(name: str, signature: Signature, data_dir: str | Path | None) -> tuple[SampleSet, Targets]:
    """Inputs and targets by the name of their data.

    Args:
        name: `npz:FILE` or `package.module:data`.
        signature: of the network that takes them.
        data_dir: where a relative FILE starts; None for the current folder.

    Raises:
        UsageError: there are no such data, or they are not the network's inputs.
        DataNotFound: the file is not there.
        ArtefactError: it cannot be read.
    """
    if own.is_own(name):
        part = own.own_data(name).part("test")
        return own.PartSamples(part=part, signature=signature), part.targets()
    form, _, place = name.partition(":")
    if form != "npz" or not place:
        raise UsageError(
            f"{name} is no data that a network of any kind is scored on.",
            expected="npz:FILE with an array for each input and one named targets, or package.module:data, "
            "was expected.",
        )
    path = Path(data_dir or "") / Path(place).expanduser()
    if not path.is_file():
        raise DataNotFound(f"{path} is not a file.", do="Correct the path after npz:.")
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
    except Exception as cause:  # NumPy and zipfile raise many kinds for what is no archive
        raise ArtefactError(
            f"{path} cannot be read as arrays of NumPy: {cause}.", do="Write it again by numpy.savez."
        ) from cause
    if TARGETS not in arrays:
        raise UsageError(
            f"{path} has no array {TARGETS}; it holds {', '.join(arrays) or 'nothing'}.",
            expected=f"An array for each of {', '.join(signature.input_names)}, and {TARGETS}, was expected.",
            do=f"Write it by numpy.savez(FILE, {TARGETS}=…, {signature.input_names[0]}=…).",
        )
    targets = arrays.pop(TARGETS)
    given = {
        one.name: _in_type(arrays[one.name], one) if one.name in arrays else None for one in signature.inputs
    }
    feeds = {key: one for key, one in given.items() if one is not None} | {
        key: one for key, one in arrays.items() if key not in given
    }
    try:
        signature.require_feeds(feeds)
    except UsageError as cause:
        raise UsageError(f"{path}: {cause.what}", expected=cause.expected, do=cause.do) from cause
    return ArraySamples(feeds=feeds, signature=signature), targets


def _in_type(array: Array, info: TensorInfo) -> Array:
    """An array in the type of an input; what would lose by that stays as it is, and is refused then."""
    wanted = numpy_dtype(info.dtype)
    whole = wanted.kind not in "iub" or array.dtype.kind in "iub"
    return array.astype(wanted) if whole else array


def named_data_info(name: str, signature: Signature, data_dir: str | Path | None) -> DataInfo:
    """The record of data that a network of any kind is scored on.

    Args:
        name: as of `named_samples`, as are signature and data_dir.

    Raises:
        UsageError: as `named_samples`.
        DataNotFound: likewise.
        ArtefactError: likewise.
    """
    samples, targets = named_samples(name, signature, data_dir)
    return DataInfo(
        name=name,
        mean=(),
        std=(),
        n_train=0,
        n_validation=0,
        n_test=len(samples),
        test_sha256=_digest(name, samples, targets),
    )


def _digest(name: str, samples: SampleSet, targets: Targets) -> str:
    if own.is_own(name):
        return own.own_data(name).part("test").sha256()
    digest = hashlib.sha256()
    for feeds in (*samples.batches(len(samples)), {TARGETS: np.asarray(targets)}):
        for key, one in feeds.items():
            digest.update(f"{key} {one.dtype} {one.shape}\n".encode())
            digest.update(np.ascontiguousarray(one).tobytes())
    return digest.hexdigest()


def calibration_of(name: str, signature: Signature, n: int) -> list[dict[str, Array]] | None:
    """Inputs of a user's own data to calibrate on, evenly spread.

    Args:
        name: of the data.
        signature: of the network that takes them.
        n: how many, at most.

    Returns:
        Batches; None where the data have neither a part `calibration` nor `train`.

    Raises:
        UsageError: they cannot be imported, or are not the network's inputs.
    """
    if not own.is_own(name):
        return None
    found = own.own_data(name)
    if not {"calibration", "train"} & set(found.parts):
        return None
    part = found.part("calibration", "train")
    rows = [at * len(part) // min(n, len(part)) for at in range(min(n, len(part)))]
    chosen = own.Part(name=part.name, samples=[part.sample(row) for row in rows])
    return list(own.PartSamples(part=chosen, signature=signature).batches(INPUTS_BATCH))
