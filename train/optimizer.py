"""The optimizer of a recipe."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from sparse_export.train.recipe import OptimizerRecipe


def make_optimizer(settings: OptimizerRecipe, model: nn.Module) -> Optimizer:
    """A fused optimizer over every parameter with a gradient.

    Biases and norms have a group of their own where they do not decay.

    Args:
        settings: of the recipe.
        model: on its device.
    """
    parameters = [value for value in model.parameters() if value.requires_grad]
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if not settings.decay_vectors:
        groups = [
            {"params": [value for value in parameters if value.ndim > 1]},
            {"params": [value for value in parameters if value.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
    if settings.name == "sgd":
        return SGD(
            groups,
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=settings.nesterov and settings.momentum > 0,
            weight_decay=settings.weight_decay,
            fused=True,
        )
    kind = Adam if settings.name == "adam" else AdamW
    return kind(groups, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True)
