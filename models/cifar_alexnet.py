"""AlexNet for 32x32 colour images, as the CIFAR-10 pruning papers have it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CifarAlexNet(nn.Module):
    """Five strided convolutions and three linear layers, batch norm and ReLU after all but the last.

    There is no pooling: the strides reduce 32x32 to 13, 7, 4, 2 and 1 (Dettmers and Zettlemoyer 2019; Lee et
    al. 2019, SNIP).

    Args:
        hidden: units of fc1 and of fc2. 1024 is AlexNet-s (5,066,784 weights for 10 classes), 2048 is
            AlexNet-b (8,484,896).
        n_classes: number of logits.
    """

    def __init__(self, hidden: int, n_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, 11, stride=2, padding=2, bias=False)
        self.bn1 = nn.BatchNorm2d(96)
        self.conv2 = nn.Conv2d(96, 256, 5, stride=2, padding=2, bias=False)
        self.bn2 = nn.BatchNorm2d(256)
        self.conv3 = nn.Conv2d(256, 384, 3, stride=2, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(384)
        self.conv4 = nn.Conv2d(384, 384, 3, stride=2, padding=1, bias=False)
        self.bn4 = nn.BatchNorm2d(384)
        self.conv5 = nn.Conv2d(384, 256, 3, stride=2, padding=1, bias=False)
        self.bn5 = nn.BatchNorm2d(256)
        self.fc1 = nn.Linear(256, hidden, bias=False)
        self.bn6 = nn.BatchNorm1d(hidden)
        self.fc2 = nn.Linear(hidden, hidden, bias=False)
        self.bn7 = nn.BatchNorm1d(hidden)
        self.fc3 = nn.Linear(hidden, n_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Compute logits (N, n_classes) of float images (N, 3, 32, 32). N is at least 2 in training mode."""
        x = torch.relu(self.bn1(self.conv1(x_NCHW)))
        x = torch.relu(self.bn2(self.conv2(x)))
        x = torch.relu(self.bn3(self.conv3(x)))
        x = torch.relu(self.bn4(self.conv4(x)))
        x = torch.relu(self.bn5(self.conv5(x)))
        x = torch.flatten(x, 1)
        x = torch.relu(self.bn6(self.fc1(x)))
        x = torch.relu(self.bn7(self.fc2(x)))
        logits: Tensor = self.fc3(x)
        return logits
