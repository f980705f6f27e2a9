"""Sums over the inputs and wanted outputs of one group of channels, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_export.oneshot.paired_sums import PairedStatistics

__all__ = ["ChannelSums", "channel_sums"]


@dataclass(frozen=True, kw_only=True)
class ChannelSums:
    """Of the o outputs and K columns of one group, float64.

    Attributes:
        n: inputs.
        gram: (K, K).
        cross: wanted outputs times inputs, (o, K).
        squares: of the wanted outputs, (o,).
        inputs: their means, (K,).
        outputs: means of the wanted outputs, (o,).
    """

    n: int
    gram: Tensor
    cross: Tensor
    squares: Tensor
    inputs: Tensor
    outputs: Tensor

    def centred(self) -> ChannelSums:
        """The same of inputs and outputs less their means: what is left where a bias takes the means."""
        return replace(
            self,
            gram=self.gram - self.n * torch.outer(self.inputs, self.inputs),
            cross=self.cross - self.n * torch.outer(self.outputs, self.inputs),
            squares=(self.squares - self.n * self.outputs.square()).clamp(min=0),
        )

    def without(self, part: ChannelSums) -> ChannelSums:
        """The sums over the inputs that are not among a part of them."""
        n = self.n - part.n
        return ChannelSums(
            n=n,
            gram=self.gram - part.gram,
            cross=self.cross - part.cross,
            squares=self.squares - part.squares,
            inputs=(self.inputs * self.n - part.inputs * part.n) / n,
            outputs=(self.outputs * self.n - part.outputs * part.n) / n,
        )

    def errors(self, weight: Tensor) -> Tensor:
        """Of each row the squared distance of its outputs from the wanted ones, (o,)."""
        wide = weight.double()
        return (self.squares + ((wide @ self.gram - 2 * self.cross) * wide).sum(1)).clamp(min=0)


def channel_sums(statistics: PairedStatistics, group: int) -> ChannelSums:
    """The sums of one group of channels. statistics: with Gram matrices and sums of inputs."""
    inputs = statistics.inputs
    assert inputs.gram is not None
    assert inputs.sums is not None
    n = inputs.n_inputs
    return ChannelSums(
        n=n,
        gram=inputs.gram[group],
        cross=statistics.cross[group],
        squares=statistics.squares[group],
        inputs=inputs.sums[group] / n,
        outputs=statistics.sums[group] / n,
    )
