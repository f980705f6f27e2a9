"""Sums over the inputs of a layer in the pruned network, and over what it should give for each.

Legend: N inputs, G groups of channels, K columns of the weight (O, K), o = O / G outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_export.oneshot.unfolding import InputStatistics, joined

__all__ = ["PairedStatistics", "PairedSums", "with_more"]


@dataclass(frozen=True, kw_only=True)
class PairedStatistics:
    """Sums of products in float32, in float64 on the CPU.

    Attributes:
        inputs: with Gram matrices and sums.
        cross: wanted outputs times inputs, (G, o, K).
        sums: of the wanted outputs, (G, o).
        squares: likewise.
    """

    inputs: InputStatistics
    cross: Tensor
    sums: Tensor
    squares: Tensor


class PairedSums:
    """Statistics that grow with every batch."""

    def __init__(self) -> None:
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, inputs_GNK: Tensor, wanted_NO: Tensor) -> None:
        """Add inputs, and what the layer should give for each, of any float type on the CPU."""
        inputs, wanted = inputs_GNK.detach().float(), wanted_NO.detach().float()
        n_groups, n_inputs, _ = inputs.shape
        wanted_GoN = wanted.reshape(n_inputs, n_groups, -1).permute(1, 2, 0)
        parts = (
            (wanted_GoN @ inputs).double(),
            wanted_GoN.sum(2, dtype=torch.float64),
            wanted_GoN.square().sum(2, dtype=torch.float64),
        )
        if self._sums is None:
            self._sums = parts
            return
        for whole, part in zip(self._sums, parts, strict=True):
            whole += part

    def statistics(self, inputs: InputStatistics | None) -> PairedStatistics | None:
        """All that was added, handed over; None where nothing was. inputs: of the same inputs."""
        if inputs is None or self._sums is None:
            return None
        (cross, sums, squares), self._sums = self._sums, None
        return PairedStatistics(inputs=inputs, cross=cross, sums=sums, squares=squares)


def with_more(one: PairedStatistics, other: PairedStatistics | None) -> PairedStatistics:
    """The statistics over the inputs of both."""
    if other is None:
        return one
    inputs = joined([one.inputs, other.inputs])
    assert inputs is not None
    return PairedStatistics(
        inputs=inputs,
        cross=one.cross + other.cross,
        sums=one.sums + other.sums,
        squares=one.squares + other.squares,
    )
