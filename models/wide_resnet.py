"""Wide residual networks for 32x32 colour images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_DROPOUT = 0.3


class _Block(nn.Module):
    """Two 3x3 convolutions, each behind batch norm and ReLU, with dropout between them, added to the input.

    Where the number of channels changes, a 1x1 convolution of the normalised input takes the input's place.
    """

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(n_in)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.dropout = nn.Dropout(_DROPOUT)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.shortcut = None if n_in == n_out else nn.Conv2d(n_in, n_out, 1, stride=stride, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        activated = torch.relu(self.bn1(x_NCHW))
        x = torch.relu(self.bn2(self.conv1(activated)))
        residual: Tensor = self.conv2(self.dropout(x))
        return residual + (x_NCHW if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """WRN-depth-widen with dropout .3 (Zagoruyko and Komodakis 2016): three groups of (depth - 4) / 6 blocks.

    The first block of each group changes the number of channels (widen > 1), so that there are three shortcut
    convolutions; the second and third group halve the map. No convolution has a bias; their initial values
    are He's, normal with variance 2 / fan-out.

    Args:
        depth: 6 n + 4.
        widen: the groups have 16, 32 and 64 times as many channels.
        n_classes: number of logits.
    """

    def __init__(self, depth: int, widen: int, n_classes: int = 10) -> None:
        super().__init__()
        n_blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.group1 = _group(n_blocks, 16, 16 * widen, stride=1)
        self.group2 = _group(n_blocks, 16 * widen, 32 * widen, stride=2)
        self.group3 = _group(n_blocks, 32 * widen, 64 * widen, stride=2)
        self.bn = nn.BatchNorm2d(64 * widen)
        self.fc = nn.Linear(64 * widen, n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Compute logits (N, n_classes) of float images (N, 3, H, W), H and W multiples of 4."""
        x = self.group3(self.group2(self.group1(self.conv1(x_NCHW))))
        x = nn.functional.adaptive_avg_pool2d(torch.relu(self.bn(x)), 1)
        logits: Tensor = self.fc(torch.flatten(x, 1))
        return logits


def _group(n_blocks: int, n_in: int, n_out: int, stride: int) -> nn.Sequential:
    """n_blocks blocks, the first of which changes channels and size."""
    first = _Block(n_in, n_out, stride)
    return nn.Sequential(first, *(_Block(n_out, n_out, stride=1) for _ in range(n_blocks - 1)))
