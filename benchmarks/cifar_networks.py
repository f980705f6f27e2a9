"""A small residual network and a small vision transformer for CIFAR-10, which a processor trains in minutes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["resnet8", "resnet20", "small_vit"]

_WIDTHS = (16, 32, 64)
_VIT_WIDTH, _N_HEADS, _N_LAYERS = 96, 4, 4


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


class SmallResNet(nn.Module):
    """The residual network of He et al. 2016 for CIFAR-10, with a first convolution of stride 2.

    That makes every map half as high and wide, and an epoch four times as short. It has 6 n + 2 layers for n blocks
    of each width.
    """

    def __init__(self, n_blocks: int, n_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, _WIDTHS[0], 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(_WIDTHS[0])
        blocks, n_in = [], _WIDTHS[0]
        for stage, n_out in enumerate(_WIDTHS):
            for index in range(n_blocks):
                blocks.append(_Block(n_in, n_out, 2 if stage and not index else 1))
                n_in = n_out
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(n_in, n_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.norm(self.stem(x_NCHW))))
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


def resnet8(n_classes: int = 10) -> nn.Module:
    """The network of 8 layers, with random weights."""
    return SmallResNet(1, n_classes)


def resnet20(n_classes: int = 10) -> nn.Module:
    """The network of 20 layers, with random weights."""
    return SmallResNet(3, n_classes)


class _Attention(nn.Module):
    """Multi-head self-attention over tokens."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self._n_heads = n_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_NLC: Tensor) -> Tensor:
        n, length, width = x_NLC.shape
        parts = self.qkv(x_NLC).reshape(n, length, 3, self._n_heads, -1).permute(2, 0, 3, 1, 4)
        found = nn.functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        mixed: Tensor = self.out(found.transpose(1, 2).reshape(n, length, width))
        return mixed


class _Layer(nn.Module):
    """Attention and two products of each token, both added to what they read, which is normed first."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, n_heads)
        self.wide = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)

    def forward(self, x_NLC: Tensor) -> Tensor:
        x = x_NLC + self.attention(self.norm1(x_NLC))
        mixed: Tensor = x + self.narrow(nn.functional.gelu(self.wide(self.norm2(x))))
        return mixed


class SmallViT(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021) over 64 patches of 4x4 pixels, four layers of 96 channels."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, _VIT_WIDTH, 4, stride=4)
        self.places = nn.Parameter(0.02 * torch.randn(1, 64, _VIT_WIDTH))
        self.layers = nn.Sequential(*(_Layer(_VIT_WIDTH, _N_HEADS) for _ in range(_N_LAYERS)))
        self.norm = nn.LayerNorm(_VIT_WIDTH)
        self.classifier = nn.Linear(_VIT_WIDTH, n_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x = self.patches(x_NCHW).flatten(2).transpose(1, 2) + self.places
        logits: Tensor = self.classifier(self.norm(self.layers(x)).mean(1))
        return logits


def small_vit(n_classes: int = 10) -> nn.Module:
    """The vision transformer, with random weights."""
    return SmallViT(n_classes)
