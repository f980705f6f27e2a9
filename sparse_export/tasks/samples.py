"""Samples as a network takes them: with labels that were held against its outputs, or without."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from sparse_export.errors import UsageError
from sparse_export.formats.preparation import RawType
from sparse_export.formats.run import DataInfo
from sparse_export.signature import Array, Signature
from sparse_export.tasks import data
from sparse_export.tasks.archives import pieces_of
from sparse_export.tasks.class_names import n_named_classes
from sparse_export.tasks.data.own import PartTargets
from sparse_export.tasks.labels import require_labels, require_outputs
from sparse_export.tasks.named_data import open_named
from sparse_export.tasks.sample_set import ArraySamples, BatchSamples, SampleSet, SingleInput
from sparse_export.tasks.shipped import IGNORED, Classification, Segmentation
from sparse_export.tasks.task import Targets, Task

__all__ = [
    "ArraySamples",
    "BatchSamples",
    "LabelledSamples",
    "SampleSet",
    "SingleInput",
    "labelled",
    "load_test_set",
    "n_outputs_of",
]


@dataclass(frozen=True)
class _Counted:
    """So many samples, of which nothing but the targets is looked at."""

    n: int
    n_values: int = 0

    def __len__(self) -> int:
        return self.n

    def batches(self, most: int) -> Iterator[dict[str, Array]]:
        return iter(())


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
    if isinstance(targets, PartTargets):
        seen = targets.seen()
        if len(seen):
            labelled(*(_Counted(len(seen)), seen, task, signature), of=of, network=network, do=do)
        return LabelledSamples(samples=samples, targets=targets, task=task)
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
        problem = task.problem(targets, n_outputs_of(signature)) or _outside(targets, task, signature)
        if problem is not None:
            raise UsageError(
                f"The targets of {of} {problem}.",
                do=f"Give targets of the task {task.name}, or another task.",
            )
    return LabelledSamples(samples=samples, targets=targets, task=task)


def _outside(targets: Array, task: Task, signature: Signature) -> str | None:
    """Class numbers of pixels that a network has no output for, as the end of a sentence; None without."""
    n_classes = n_named_classes(signature) if isinstance(task, Segmentation) else None
    if n_classes is None:
        return None
    for piece in pieces_of(targets):
        known = piece[piece != IGNORED]
        if known.size and (int(known.min()) < 0 or int(known.max()) >= n_classes):
            worst = int(known.min()) if int(known.min()) < 0 else int(known.max())
            return f"hold the class {worst}, and the network has the classes 0 to {n_classes - 1}"
    return None


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
    workers: int = 0,
    raw: RawType | None = None,
) -> LabelledSamples:
    """Load the test set on record.

    Args:
        info: the data of a run or a bundle.
        signature: of its network.
        data_dir: where the data sets lie.
        task: that it was trained for.
        network: the network, for the message.
        do: what to do where it does not fit the task, a sentence.
        workers: processes that decode pictures; 0 for threads.
        raw: the type of raw samples, for a network that normalizes them itself; None to normalize them here.

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
        found = open_named(info.name, signature, data_dir)
        data.require_digest(info, found.sha256())
        return labelled(found.samples, found.targets, task, signature, of=of, network=network, do=do)
    inputs, targets = data.load_test_set(
        info,
        signature.input_shape,
        data_dir,
        classes=isinstance(task, Classification),
        workers=workers,
        raw=raw,
    )
    samples = SingleInput(name=signature.input_names[0], inputs=inputs)
    return labelled(samples, targets, task, signature, of=of, network=network, do=do)
