"""Networks for `bench_lossless`, made as a user's own: `benchmarks.lossless_networks:NAME`."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - its customary name
from torch import Tensor, nn


def small_vgg() -> nn.Sequential:
    """Six 3x3 convolutions of 32 to 256 channels for 32x32 colour images: 1.14 million weights."""
    layers: list[nn.Module] = []
    channels = 3
    for i, width in enumerate((32, 64, 128, 128, 256, 256)):
        layers += [
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        if i != 2 and i != 4:
            layers.append(nn.MaxPool2d(2))
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 4, 10))


class _Block(nn.Module):
    """Attention and a perceptron, each on a normed copy of the residual stream."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def _heads(self, x_NTD: Tensor) -> Tensor:
        heads: Tensor = x_NTD.unflatten(2, (self.n_heads, -1)).transpose(1, 2)
        return heads

    def forward(self, x_NTD: Tensor) -> Tensor:
        """The stream (N, tokens, width), changed."""
        y = self.norm1(x_NTD)
        attended = F.scaled_dot_product_attention(
            self._heads(self.q(y)), self._heads(self.k(y)), self._heads(self.v(y))
        )
        x_NTD = x_NTD + self.proj(attended.transpose(1, 2).flatten(2))
        changed: Tensor = x_NTD + self.fc2(F.gelu(self.fc1(self.norm2(x_NTD))))
        return changed


class SmallViT(nn.Module):
    """Two blocks of width 128 over 16 patches of 7x7: 0.40 million weights. For 28x28 grey images."""

    def __init__(self, width: int = 128, n_blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(49, width)
        self.position = nn.Parameter(torch.randn(16, width) * 0.02)
        self.blocks = nn.Sequential(*[_Block(width, 4) for _ in range(n_blocks)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits (N, 10) for float images (N, 1, 28, 28)."""
        patches = x_NCHW.squeeze(1).unflatten(2, (4, 7)).unflatten(1, (4, 7)).permute(0, 1, 3, 2, 4)
        x = self.embed(patches.flatten(3).flatten(1, 2)) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return logits


def small_vit() -> SmallViT:
    """See SmallViT."""
    return SmallViT()
