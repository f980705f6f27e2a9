"""A network with batch norms for 28x28 images, which none of the known ones is."""

from __future__ import annotations

from torch import nn


def norms_cnn(n_classes: int = 10) -> nn.Module:
    """Three convolutions of stride 2 with batch norm, two linear layers: 89,680 weights."""
    layers: list[nn.Module] = []
    for n_in, n_out in ((1, 16), (16, 32), (32, 64)):
        layers += [
            nn.Conv2d(n_in, n_out, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
            nn.ReLU(),
        ]
    layers += [nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, n_classes)]
    return nn.Sequential(*layers)
