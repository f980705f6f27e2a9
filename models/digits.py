"""A small convolutional network for the 8x8 digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DigitsCNN(nn.Module):
    """Three convolutions with batch norm, then two linear layers: 40,208 weights.

    Channels are multiples of 16, so that every layer but conv1, which has one input channel, suits 2:4.
    """

    def __init__(self, n_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(64)
        self.fc1 = nn.Linear(256, 64)
        self.fc2 = nn.Linear(64, n_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Compute logits (N, n_classes) of float images (N, 1, 8, 8)."""
        x = torch.relu(self.bn1(self.conv1(x_NCHW)))
        x = nn.functional.max_pool2d(torch.relu(self.bn2(self.conv2(x))), 2)
        x = nn.functional.max_pool2d(torch.relu(self.bn3(self.conv3(x))), 2)
        x = torch.flatten(x, 1)
        x = torch.relu(self.fc1(x))
        logits: Tensor = self.fc2(x)
        return logits
