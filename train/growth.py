"""What growth goes by where it is not momentum, and what a grown weight starts with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_export.errors import UsageError

_STATISTICS = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def random_scores(parameters: Mapping[str, nn.Parameter], seed: int, step: int) -> dict[str, Tensor]:
    """A random number for every weight, so that the k largest are k drawn at random.

    Drawn on the CPU from the seed and the step alone: the same after a resume, and in every process.
    Returns float64, above 0, on the weights' device.
    """
    key = hashlib.sha256(f"growth {seed} {step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
    return {
        # 1 is added because 0 would be the score of what is no candidate.
        name: (1 + torch.rand(value.shape, generator=generator, dtype=torch.float64)).to(value.device)
        for name, value in parameters.items()
    }


def gradient_scores(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradient of the last step, of inactive weights too. Raises UsageError where there is none."""
    scores = {}
    for name, value in parameters.items():
        if value.grad is None:
            raise UsageError(
                f"{name} has no gradient.",
                expected="growth='gradient' expected that of the step before the mask update.",
                do="Do not clear gradients between the step and the update, or choose another growth.",
            )
        scores[name] = value.grad
    return scores


@torch.no_grad()
def forget_momentum(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], born: Mapping[str, Tensor]
) -> None:
    """Zero the optimiser's statistics where `born` is True, in place.

    A weight that is inactive, and whose momentum is zeroed when it is grown, trains as if its gradient had been
    masked all along, which is how these methods save the dense gradient.
    """
    for name, value in parameters.items():
        state = optimizer.state.get(value, {})
        for key in _STATISTICS:
            if isinstance(state.get(key), Tensor):
                state[key].masked_fill_(born[name], 0)
