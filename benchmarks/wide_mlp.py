"""A network that is nearly all matrix products, so that a training step of it shows what sparsity can give at
best.

sparse-export bench-train benchmarks/wide-mlp.toml --input-shape 1,28,28
sparse-export bench-train benchmarks/wide-mlp-csr.toml --input-shape 4096
"""

from __future__ import annotations

from torch import nn


def wide_mlp(n_classes: int = 10) -> nn.Module:
    """784 inputs, two hidden layers of 2048."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 2048),
        nn.ReLU(),
        nn.Linear(2048, 2048),
        nn.ReLU(),
        nn.Linear(2048, n_classes),
    )


def wide_mlp_4096(n_classes: int = 4096) -> nn.Module:
    """Four layers of 4096."""
    return nn.Sequential(
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Linear(4096, n_classes),
    )
