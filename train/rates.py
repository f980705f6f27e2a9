"""The learning rate over time."""

from __future__ import annotations

import math

from sparse_export.train.recipe import LearningRateRecipe


def learning_rate(step: int, total_steps: int, initial: float, recipe: LearningRateRecipe) -> float:
    """The learning rate of a step, a function of its number alone.

    Args:
        step: from 0.
        total_steps: of the schedule.
        initial: the rate that it starts from.
        recipe: the schedule.
    """
    rate = initial
    if recipe.schedule == "cosine":
        rate = initial * (1 + math.cos(math.pi * step / total_steps)) / 2
    elif recipe.schedule == "step":
        n_drops = sum(step >= round(drop * total_steps) for drop in recipe.drops)
        rate = float(initial * recipe.factor**n_drops)
    n_warmup = round(recipe.warmup * total_steps)
    return rate if step >= n_warmup else rate * (step + 1) / n_warmup
