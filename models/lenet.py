"""The two LeNets of the pruning literature, for 28x28 grey images."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LeNet300100(nn.Module):
    """784-300-100-10 with ReLU: 266,200 weights, 410 biases (LeCun et al. 1998, section III.C.4)."""

    def __init__(self, n_classes: int = 10) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, n_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Compute logits (N, n_classes) of float images (N, 1, 28, 28)."""
        x = torch.flatten(x_NCHW, 1)
        x = torch.relu(self.fc1(x))
        x = torch.relu(self.fc2(x))
        logits: Tensor = self.fc3(x)
        return logits


class LeNet5(nn.Module):
    """LeNet-5 as Caffe's MNIST example has it: 20 and 50 filters of 5x5, then 500 and 10 units.

    430,500 weights, 580 biases. Caffe's example puts a ReLU after fc1 only; here, as in the pruning papers,
    one follows each convolution too.
    """

    def __init__(self, n_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, n_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Compute logits (N, n_classes) of float images (N, 1, 28, 28)."""
        x = nn.functional.max_pool2d(torch.relu(self.conv1(x_NCHW)), 2)
        x = nn.functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        x = torch.flatten(x, 1)
        x = torch.relu(self.fc1(x))
        logits: Tensor = self.fc2(x)
        return logits
