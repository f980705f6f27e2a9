"""Randomness that follows from a run's seed and a place in the run alone, so that no state is saved."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["augmentation_generator", "epoch_order", "seed_step"]

_ORDER, _AUGMENTATION = 0, 1 << 60  # apart, so that no two uses of a seed draw the same numbers


def epoch_order(seed: int, epoch: int, n_samples: int) -> Tensor:
    """The order in which an epoch goes through its samples: int64, shape (n_samples,)."""
    return torch.randperm(n_samples, generator=_generator(seed, _ORDER, epoch))


def augmentation_generator(seed: int, step: int) -> torch.Generator:
    """The generator of a step's augmentation, on the CPU, the same in every process."""
    return _generator(seed, _AUGMENTATION, step)


def seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seed what the network itself draws in a step, as dropout does; each rank draws its own."""
    key = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    number = int.from_bytes(key[:7], "big")
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)


def _generator(seed: int, purpose: int, place: int) -> torch.Generator:
    return torch.Generator().manual_seed(purpose + seed * 1_000_003 + place)
