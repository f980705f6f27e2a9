"""A loop of somebody's own that a sweep runs: it knows nothing of recipes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import sparse_export as se
from sparse_export.formats.score import Score


def main(
    *, out: Path, seed: int, density: float = 0.2, width: int = 16, method: str = "set", **rest: object
) -> None:
    """Train a small network on made-up numbers, and leave a run."""
    assert not rest
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = se.SparseTraining(
        model, optimizer, density=density, total_steps=40, update_every=5, method=method, seed=seed
    )
    x = torch.randn(256, 12)
    y = x[:, :4].argmax(1)
    for step in range(40):
        rows = slice(step % 4 * 64, step % 4 * 64 + 64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        trainer.step()
    n_correct = int((model(x).argmax(1) == y).sum())
    score = Score(n_correct=n_correct, n_samples=len(x))
    trainer.run(out, test=score, validation=score)


def leaves_nothing(*, out: Path, seed: int) -> None:
    """Forget the run."""


def fails(*, out: Path, seed: int) -> None:
    """Raise what somebody's code raises."""
    raise ZeroDivisionError("somebody's own mistake")


number = 3
