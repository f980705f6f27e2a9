"""The test set that a run or a bundle names, its labels held against the outputs of the network."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparse_export.formats.run import DataInfo
from sparse_export.signature import Signature
from sparse_export.tasks import data
from sparse_export.tasks.labels import require_labels, require_outputs

__all__ = ["LabelledSamples", "load_test_set"]


class LabelledSamples(NamedTuple):
    """Samples that a network can be scored on.

    Attributes:
        inputs: float32 (n, *input_shape), as the network takes them.
        labels: class numbers (n,).
    """

    inputs: data.Inputs
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
        UsageError: a network with one output, or labels that are not its class numbers.
        DataNotFound: the data are not there.
        ArtefactError: they are not those on record.
        MissingCapability: the library that reads them is not installed.
    """
    n_classes = require_outputs(signature.n_classes, network, do=do)
    inputs, labels = data.load_test_set(info, signature.input_shape, data_dir)
    of = f"the test set of {info.name}"
    known = require_labels(labels, n_samples=len(inputs), n_outputs=n_classes, of=of)
    return LabelledSamples(inputs, known)
