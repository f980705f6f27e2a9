"""Sparse training: the recipe, its loop, and the trainer for anybody's loop."""

from __future__ import annotations

from sparse_export.train.loop import train
from sparse_export.train.recipe import Recipe, load_recipe
from sparse_export.train.sparse_training import SparseTraining
from sparse_export.train.sparsity_config import SparsityConfig

__all__ = ["Recipe", "SparseTraining", "SparsityConfig", "load_recipe", "train"]
