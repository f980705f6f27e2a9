"""SET, sparse evolutionary training: as many weights as a layer lost are grown in it again, at random.

Prune: the smallest |weight| of each layer, by the prune rate. Redistribution: each layer gets back what it
lost. Growth: positions drawn at random; a grown weight starts without momentum. Schedule: masks move to the
end.

Source: Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive sparse connectivity
inspired by network science". On purpose different: the smallest magnitudes are pruned, not the smallest
positive and the largest negative weights; prune rate and schedule are the recipe's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparse_export.train.methods.method import Growth, Method, Moment
from sparse_export.train.methods.swap_weights import swap_weights

__all__ = ["RANDOM", "SET", "random_scores"]


def random_scores(parameters: Mapping[str, nn.Parameter], seed: int, step: int) -> dict[str, Tensor]:
    """A random number for every weight, so that the k largest are k drawn at random.

    Drawn on the CPU from the seed and the step alone: the same after a resume, and in every process.

    Args:
        parameters: by name.
        seed: of the training.
        step: optimizer steps done.

    Returns:
        float64, above 0, on the weights' device.
    """
    key = hashlib.sha256(f"growth {seed} {step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
    return {
        # 1 is added because 0 would be the score of what is no candidate.
        name: (1 + torch.rand(value.shape, generator=generator, dtype=torch.float64)).to(value.device)
        for name, value in parameters.items()
    }


def _scores(at: Moment) -> dict[str, Tensor]:
    return random_scores(at.parameters, at.seed, at.step)


RANDOM = Growth(name="random", scores=_scores)

SET = Method(
    name="set",
    update=swap_weights,
    prune="magnitude",
    redistribution="own",
    growth=RANDOM,
    forgets=True,
    freeze=1.0,
    final_prune_rate=0.005,
)
