"""The learning rate over time."""

from __future__ import annotations

import math

from sparse_export.train.recipe import LearningRateRecipe


def learning_rate(step: int, total_steps: int, initial: float, recipe: LearningRateRecipe) -> float:
    """The learning rate of step `step` (from 0) of `total_steps`; a function of the step alone."""
    rate = initial
    if recipe.schedule == "cosine":
        rate = initial * (1 + math.cos(math.pi * step / total_steps)) / 2
    elif recipe.schedule == "step":
        n_drops = sum(step >= round(drop * total_steps) for drop in recipe.drops)
        rate = float(initial * recipe.factor**n_drops)
    n_warmup = round(recipe.warmup * total_steps)
    return rate if step >= n_warmup else rate * (step + 1) / n_warmup
