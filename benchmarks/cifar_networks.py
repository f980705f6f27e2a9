"""A small residual network for CIFAR-10, which a processor trains in minutes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["resnet20"]

_WIDTHS = (16, 32, 64)
_N_BLOCKS = 3  # of each width


class _Block(nn.Module):
    """Two 3x3 convolutions with batch norm, added to the input.

    Where the size changes, a 1x1 convolution of the input takes the input's place.
    """

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or n_in != n_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(n_in, n_out, 1, stride=stride, bias=False), nn.BatchNorm2d(n_out)
            )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        found = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x_NCHW)))))
        return torch.relu(found + self.shortcut(x_NCHW))


class ResNet20(nn.Module):
    """The residual network of 20 layers of He et al. 2016, with a first convolution of stride 2.

    That makes every map half as high and wide, and an epoch four times as short.
    """

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, _WIDTHS[0], 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(_WIDTHS[0])
        blocks, n_in = [], _WIDTHS[0]
        for stage, n_out in enumerate(_WIDTHS):
            for index in range(_N_BLOCKS):
                blocks.append(_Block(n_in, n_out, 2 if stage and not index else 1))
                n_in = n_out
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(n_in, n_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.norm(self.stem(x_NCHW))))
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


def resnet20(n_classes: int = 10) -> nn.Module:
    """The network, with random weights."""
    return ResNet20(n_classes)
