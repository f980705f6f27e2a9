"""VGG-16 for 32x32 colour images, as the CIFAR-10 pruning papers have it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_WIDTHS = (64, 128, 256, 512, 512)
_N_CONVOLUTIONS = (2, 2, 3, 3, 3)


class CifarVGG(nn.Module):
    """Thirteen convolutions in five groups, each followed by a 2x2 max pool; then linear layers of 512 units.

    Each convolution is followed by batch norm and ReLU, each hidden linear layer by ReLU and, where the
    original has dropout, by batch norm (Simonyan and Zisserman 2015, table 1; Lee et al. 2019, SNIP).

    Args:
        pointwise: the third convolution of groups 3 to 5 is 1x1, as in VGG's column C, instead of 3x3 as in
            D. It keeps the padding of 1, so that each map grows by 2 there and fc1 gets 2x2 of them: 2048
            inputs instead of 512.
        n_hidden: linear layers before the last one: 2 in C (11,307,712 weights for 10 classes) and D
            (15,239,872), 1 in VGG-like (14,977,728).
        n_classes: number of logits.
    """

    def __init__(self, *, pointwise: bool, n_hidden: int, n_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential()
        channels = 3
        for group, (width, n_convolutions) in enumerate(zip(_WIDTHS, _N_CONVOLUTIONS, strict=True), start=1):
            for i in range(1, n_convolutions + 1):
                kernel = 1 if pointwise and i == 3 else 3
                convolution = nn.Conv2d(channels, width, kernel, padding=1, bias=False)
                self.features.add_module(f"conv{group}_{i}", convolution)
                self.features.add_module(f"bn{group}_{i}", nn.BatchNorm2d(width))
                self.features.add_module(f"relu{group}_{i}", nn.ReLU())
                channels = width
            self.features.add_module(f"pool{group}", nn.MaxPool2d(2))
        self.classifier = nn.Sequential()
        n_inputs = 2048 if pointwise else 512
        for i in range(1, n_hidden + 1):
            self.classifier.add_module(f"fc{i}", nn.Linear(n_inputs, 512))
            self.classifier.add_module(f"relu{i}", nn.ReLU())
            self.classifier.add_module(f"bn{i}", nn.BatchNorm1d(512))
            n_inputs = 512
        self.classifier.add_module(f"fc{n_hidden + 1}", nn.Linear(n_inputs, n_classes))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Compute logits (N, n_classes) of float images (N, 3, 32, 32). N is at least 2 in training mode."""
        logits: Tensor = self.classifier(torch.flatten(self.features(x_NCHW), 1))
        return logits
