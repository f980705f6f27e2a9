"""Networks with batch norms whose statistics are those of what they meet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_export.tasks import data
from sparse_export.tasks.data.dataset import normalise

__all__ = ["Mobile", "mobile", "of_digits", "settled", "vectors"]


class Mobile(nn.Module):
    """Of pictures: a layer that stays dense, a depthwise one, which none can prune, and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.wide, self.wide_norm = nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.each, self.each_norm = nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.BatchNorm2d(32)
        self.thin, self.thin_norm = nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        inner = torch.relu(self.wide_norm(self.wide(x)))
        inner = torch.relu(self.each_norm(self.each(inner)))
        x = torch.relu(x + self.thin_norm(self.thin(inner)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@torch.no_grad()
def settled(network: nn.Module, x: Tensor) -> nn.Module:
    """Give batch norms the statistics of what they meet on inputs, and gains and shifts that differ."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.uniform_(-0.5, 0.5)
            module.momentum = 1.0
    network.train()
    network(x)
    return network.eval()


def mobile() -> nn.Module:
    torch.manual_seed(0)
    return settled(Mobile(), torch.rand(256, 1, 8, 8))


def of_digits() -> nn.Module:
    """The same with the statistics of the data that it is pruned on."""
    torch.manual_seed(0)
    digits = data.load("digits")
    return settled(Mobile(), normalise(digits.x_train[:512], digits.mean, digits.std))


def vectors() -> nn.Module:
    """Each sample has one value for each channel, so that few samples tell little of a variance."""
    torch.manual_seed(0)
    layers = [part for _ in range(4) for part in (nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU())]
    return settled(nn.Sequential(*layers, nn.Linear(32, 8)), torch.randn(4096, 32))
