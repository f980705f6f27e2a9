"""The learning rate over time."""

from __future__ import annotations

import math

from sparse_export.train.recipe import LearningRateRecipe


def learning_rate(step: int, total_steps: int, initial: float, recipe: LearningRateRecipe) -> float:
    """The learning rate of step `step` (from 0) of `total_steps`; a function of the step alone."""
    progress = step / total_steps
    if recipe.schedule == "cosine":
        return initial * (1 + math.cos(math.pi * progress)) / 2
    if recipe.schedule == "constant":
        return initial
    n_drops = sum(step >= round(drop * total_steps) for drop in recipe.drops)
    return float(initial * recipe.factor**n_drops)
