"""The value that every data set is, with the functions for all of them.

Shapes: N samples, C channels, H rows, W columns. Features without a picture are (N, C) or (N, C, …).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sparse_export.errors import UsageError
from sparse_export.formats.preparation import RawType
from sparse_export.signature import Array
from sparse_export.tasks.archives import pieces_of
from sparse_export.tasks.labels import require_labels

UINT8_MAX = 255


@dataclass(frozen=True, kw_only=True, eq=False)
class DataSet:
    """A data set in memory.

    Attributes:
        name: of the data set.
        x_train: uint8 (N, C, H, W), or float32 (N, C, …).
        y_train: int64 (N,), 0 <= y < n_classes; without classes numbers (N, …).
        x_test: as x_train.
        y_test: as y_train.
        mean: per channel, of uint8 inputs after scaling to 0..1.
        std: likewise; none is zero.
        n_classes: number of classes; None for targets that are none.
        test_digest: of the test set, where it is not computed from its arrays, see `test_sha256`.
        class_names: name of each class; empty where they have none.

    Raises:
        UsageError: labels do not fit.
    """

    name: str
    x_train: Tensor = field(repr=False)
    y_train: Tensor = field(repr=False)
    x_test: Tensor = field(repr=False)
    y_test: Tensor = field(repr=False)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    n_classes: int | None
    test_digest: str = ""
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.n_classes is None:
            return
        for part, x, y in (("training", self.x_train, self.y_train), ("test", self.x_test, self.y_test)):
            require_labels(y, n_samples=len(x), n_outputs=self.n_classes, of=f"the {part} set of {self.name}")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample, without the batch axis."""
        return tuple(self.x_train.shape[1:])


def normalise(
    x: Tensor, mean: Sequence[float], std: Sequence[float], *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Compute (x - mean) / std per channel, of x / 255 where x is uint8.

    Args:
        x: (N, C, …), not changed.
        mean: C numbers.
        std: C numbers.
        dtype: of the result; the arithmetic is in float32, or in float64 for float64.

    Returns:
        A tensor of the shape of x, on its device.

    Raises:
        UsageError: C is not the length of both.
    """
    if not (x.ndim >= 2 and x.shape[1] == len(mean) == len(std)):
        raise UsageError(
            f"Inputs of shape {tuple(x.shape)} came with {len(mean)} means and {len(std)} "
            "standard deviations, not one of each for every channel (axis 1).",
            do="Use the mean and std of the data set that the inputs are from.",
        )
    working = torch.float64 if dtype == torch.float64 else torch.float32
    per_channel = (1, -1) + (1,) * (x.ndim - 2)
    mean_1C = torch.tensor(mean, dtype=working, device=x.device).view(per_channel)
    std_1C = torch.tensor(std, dtype=working, device=x.device).view(per_channel)
    if x.dtype == torch.uint8:  # the conversion is a copy of its own, which the rest may write to
        centred = x.to(working).div_(UINT8_MAX).sub_(mean_1C)
    else:
        centred = x.to(working) - mean_1C
    return centred.div_(std_1C).to(dtype)


def as_inputs(x: Tensor, mean: Sequence[float], std: Sequence[float], raw: RawType | None = None) -> Array:
    """Make inputs of samples: normalized, or raw for a network that normalizes them itself.

    Args:
        x: (N, C, …), not changed.
        mean: C numbers.
        std: C numbers.
        raw: the type that raw samples are to have; None to normalize.

    Returns:
        float32, or the raw samples in their type.
    """
    if raw is None:
        normalised: Array = normalise(x, mean, std).numpy()
        return normalised
    return x.numpy().astype(raw, copy=False)


def channel_statistics(x: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute mean and population standard deviation of each channel, as `normalise` takes them.

    Args:
        x: (N, C, …), uint8 (exact, from counts of the 256 values, then scaled to 0..1) or float (in float64).

    Returns:
        C means, and C standard deviations. A constant channel has the standard deviation 1, so that dividing
        by it changes nothing.
    """
    array = x.numpy()
    found = [
        _of_levels(array, at) if array.dtype == np.uint8 else _of_floats(array, at)
        for at in range(x.shape[1])
    ]
    return tuple(mean for mean, _ in found), tuple(std or 1.0 for _, std in found)


def _of_levels(x: Array, channel: int) -> tuple[float, float]:
    """Of uint8, from how often each value stands there."""
    levels = np.arange(UINT8_MAX + 1)
    counts = np.zeros(UINT8_MAX + 1, np.int64)
    for piece in pieces_of(x):
        counts += np.bincount(piece[:, channel].ravel(), minlength=UINT8_MAX + 1)
    n = int(counts.sum())
    mean = float(counts @ levels) / n
    std = float(np.sqrt(counts @ (levels - mean) ** 2 / n))
    return mean / UINT8_MAX, std / UINT8_MAX


def _of_floats(x: Array, channel: int) -> tuple[float, float]:
    """Of floats, piece by piece: sums of squares about the means of the pieces are added up.

    Source: Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance" (1983), equation 2.1.
    """
    n, mean, squares = 0, 0.0, 0.0
    low, high = np.inf, -np.inf
    for piece in pieces_of(x):
        values = piece[:, channel].ravel()
        low, high = min(low, float(values.min())), max(high, float(values.max()))
        own_mean = float(values.mean(dtype=np.float64))
        own_squares = float(values.std(dtype=np.float64)) ** 2 * values.size
        total = n + values.size
        squares += own_squares + (own_mean - mean) ** 2 * n * values.size / total
        mean = own_mean if not n else mean + (own_mean - mean) * values.size / total
        n = total
    return mean, 0.0 if low == high else float(np.sqrt(squares / n))


def first_of_validation(n: int, fraction: float, name: str) -> int:
    """Locate the validation part: the last `fraction` of the training samples, rounded.

    Args:
        n: number of training samples.
        fraction: from 0 to below 1; above 0 the part has one sample at least.
        name: of the data set, for the message.

    Returns:
        Index of its first sample.

    Raises:
        UsageError: no sample would be left to train on.
    """
    n_validation = max(1, round(n * fraction)) if fraction > 0 else 0
    if not 0 <= fraction < 1 or n_validation >= n:
        raise UsageError(
            f"A validation share of {fraction} of the {n} training samples of {name} "
            "leaves none to train on, or is not from 0 to below 1.",
            do="Choose a smaller share.",
        )
    return n - n_validation


def split(data: DataSet, fraction: float = 0.1) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Split the training set, see `first_of_validation`.

    Args:
        data: the data set.
        fraction: share of the validation part.

    Returns:
        (x, y) to train on and (x, y) to validate on, views.

    Raises:
        UsageError: no sample would be left to train on.
    """
    first = first_of_validation(len(data.y_train), fraction, data.name)
    return (data.x_train[:first], data.y_train[:first]), (data.x_train[first:], data.y_train[first:])


def test_sha256(data: DataSet) -> str:
    """Compute the hex SHA-256 of the raw test inputs and labels: type, shape and little-endian bytes of each.

    Args:
        data: the data set. Of a folder of pictures the digest is that of its files, the same for every size
            that they are decoded to.
    """
    if data.test_digest:
        return data.test_digest
    digest = hashlib.sha256()
    for tensor in (data.x_test, data.y_test):
        array = tensor.numpy()
        digest.update(f"{array.dtype.name} {array.shape}\n".encode())
        for piece in pieces_of(array):
            whole = np.ascontiguousarray(piece)
            digest.update(whole.astype(whole.dtype.newbyteorder("<"), copy=False).data)
    return digest.hexdigest()


test_sha256.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it where a test imports it
