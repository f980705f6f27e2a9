"""Training by sparse momentum: the recipe, the wrapper for anybody's loop, and a loop of our own."""

from __future__ import annotations

from sparse_export.train.loop import train
from sparse_export.train.recipe import Recipe, load_recipe
from sparse_export.train.sparse_training import SparseTraining

__all__ = ["Recipe", "SparseTraining", "load_recipe", "train"]
