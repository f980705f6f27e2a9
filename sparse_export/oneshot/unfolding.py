"""What a weight is multiplied by, as rows of a matrix, and sums over such rows.

Products are made in float32, over at most 32 MB of inputs at once, and summed up in float64.

Legend: N samples, C channels, P kernel positions, G groups of channels, K columns as `columns_from_weight`
has them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from scipy.linalg.blas import ssyrk
from torch import Tensor

from sparse_export.errors import UsageError

__all__ = [
    "LARGEST_GRAM",
    "InputStatistics",
    "InputSums",
    "gram_too_large",
    "joined",
    "patches",
    "require_finite",
    "rows",
]

LARGEST_GRAM = 10_000**2
"""Most numbers in the Gram matrices of one layer: 0.8 GB in float64, and 2 GB while a batch is added. A
square of 10,000 takes in the first Linear of AlexNet and the widest convolutions of Wide ResNet-50-2 (9216
columns), and leaves out the first Linear of VGG-16 (25,088), whose matrix and its copies would come to 12.6
GB."""

_CHUNK = 1 << 23  # numbers of unfolded inputs at once
_MIRRORED = 512  # rows of a Gram matrix that are filled up together


@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """Sums over all inputs that a layer met, on the CPU, in float64, of products in float32.

    n_inputs: how many there were: samples, times places of a convolution or tokens.
    squares: (G, K), the diagonal of the Gram matrices.  gram: (G, K, K), or None where it was not asked for. G is 1 but for grouped
    convolutions, of whose rows each block belongs to one group.  sums: of the inputs themselves, (G, K), or None where they were not
    asked for.
    """

    n_inputs: int
    squares: Tensor
    gram: Tensor | None
    sums: Tensor | None = None

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.squares).all())


class InputSums:
    """Statistics that grow with every batch."""

    def __init__(self, *, gram: bool, sums: bool = False) -> None:
        self._asks_gram, self._asks_sums = gram, sums
        self._n_inputs = 0
        self._squares: Tensor | None = None
        self._gram: Tensor | None = None
        self._sums: Tensor | None = None

    def add(self, inputs_GNK: Tensor) -> None:
        """Add inputs of any float type, on any device."""
        inputs = inputs_GNK.detach().float()
        if self._asks_gram:
            if self._gram is None:
                size = inputs.shape[2]
                self._gram = torch.zeros((len(inputs), size, size), dtype=torch.float64)
            for sums, one in zip(self._gram, inputs, strict=True):
                sums += _upper_products(one)
        else:
            squares = inputs.square().sum(1, dtype=torch.float64).cpu()
            self._squares = squares if self._squares is None else self._squares.add_(squares)
        if self._asks_sums:
            sums = inputs.sum(1, dtype=torch.float64).cpu()
            self._sums = sums if self._sums is None else self._sums.add_(sums)
        self._n_inputs += inputs.shape[1]

    def statistics(self) -> InputStatistics | None:
        """All that was added, handed over; None where nothing was."""
        if self._gram is None:
            squares, gram = self._squares, None
        else:
            gram, self._gram = self._gram, None
            for one in gram:
                _mirror(one)
            squares = gram.diagonal(dim1=1, dim2=2).clone()
        if squares is None:
            return None
        return InputStatistics(n_inputs=self._n_inputs, squares=squares, gram=gram, sums=self._sums)


def _upper_products(inputs_NK: Tensor) -> Tensor:
    """The Gram matrix of some inputs, float32 (K, K) on the CPU; what is below the diagonal is not meant.

    BLAS has a routine that leaves that half out, and takes half the time.
    """
    if inputs_NK.device.type != "cpu":
        return (inputs_NK.mT @ inputs_NK).cpu()
    # Of a matrix in C's order ssyrk sees the transpose; what it calls the lower triangle is the upper one.
    return torch.from_numpy(ssyrk(1.0, inputs_NK.contiguous().numpy().T, lower=1).T)


def _mirror(matrix_KK: Tensor) -> None:
    """Write what is above the diagonal below it too, in place, without a copy of the whole."""
    for start in range(0, len(matrix_KK), _MIRRORED):
        block = matrix_KK[start : start + _MIRRORED]
        stop = start + len(block)
        block[:, :start] = matrix_KK[:start, start:stop].mT
        inner = block[:, start:stop]
        inner.copy_(inner.triu() + inner.triu(1).mT)


def require_finite(name: str, statistics: InputStatistics) -> None:
    """Raise UsageError where inputs of a weight were NaN or infinite."""
    if not statistics.is_finite:
        raise UsageError(
            f"On the calibration data the inputs of {name} are NaN or infinite.",
            expected="Finite ones were expected.",
            do="Look at the weights of the layers before it, and at the data.",
        )


def joined(parts: Sequence[InputStatistics]) -> InputStatistics | None:
    """The statistics of one weight that meets all these inputs; None where there are none."""
    if len(parts) < 2:
        return parts[0] if parts else None
    grams = [part.gram for part in parts if part.gram is not None]
    sums = [part.sums for part in parts if part.sums is not None]
    return InputStatistics(
        n_inputs=sum(part.n_inputs for part in parts),
        squares=torch.stack([part.squares for part in parts]).sum(0),
        gram=sum(grams[1:], start=grams[0]) if len(grams) == len(parts) else None,
        sums=torch.stack(sums).sum(0) if len(sums) == len(parts) else None,
    )


def gram_too_large(n_groups: int, n_columns: int) -> str:
    """Why the Gram matrices of a weight's inputs are too large to ask for; empty where they are not."""
    if n_groups * n_columns**2 <= LARGEST_GRAM:
        return ""
    many = f"{n_groups} times " if n_groups > 1 else ""
    return (
        f"the Gram matrix of its inputs would have {many}{n_columns:,} x {n_columns:,} numbers, "
        f"more than the {LARGEST_GRAM:,} that are held in memory"
    )


def rows(x: Tensor) -> Iterator[Tensor]:
    """The inputs of a matrix, of which every last axis of x is one: (1, inputs, K), in parts."""
    yield from parts_of(x.reshape(1, -1, x.shape[-1]))


def parts_of(inputs_GNK: Tensor) -> Iterator[Tensor]:
    """Inputs in parts of bounded size."""
    n_groups, _, n_columns = inputs_GNK.shape
    yield from inputs_GNK.split(max(1, _CHUNK // max(1, n_groups * n_columns)), dim=1)


def patches(
    x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], groups: int
) -> Iterator[Tensor]:
    """The patches that a convolution's kernel meets, (G, patches, P * C), channels last, in parts.

    x: (N, channels, …), padded already.  kernel, strides, dilations: a number for each axis after these two.
    """
    counts = [
        max(0, (size - dilation * (width - 1) - 1) // stride + 1)
        for size, width, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True)
    ]
    line = math.prod([*counts[1:], *kernel, x.shape[1]])  # numbers of one sample at one place of axis 0
    n_lines = max(1, min(counts[0], _CHUNK // max(1, line)))
    n_samples = max(1, _CHUNK // max(1, line * n_lines))
    x = x.movedim(1, -1).contiguous()
    n_channels = x.shape[-1] // groups
    steps = x.stride()[1:-1]
    for start in range(0, len(x), n_samples):
        for first in range(0, counts[0], n_lines):
            part = x[start : start + n_samples]
            places = [min(n_lines, counts[0] - first), *counts[1:]]
            view = part.as_strided(
                (len(part), *places, *kernel, groups, n_channels),
                (
                    part.stride(0),
                    *(step * stride for step, stride in zip(steps, strides, strict=True)),
                    *(step * dilation for step, dilation in zip(steps, dilations, strict=True)),
                    n_channels,
                    1,
                ),
                part.storage_offset() + first * strides[0] * steps[0],
            )
            yield view.movedim(-2, 0).reshape(groups, len(part) * math.prod(places), -1)
