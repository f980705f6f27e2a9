"""What keeps a network sparse, by the method that a recipe names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from sparse_export.train.recipe import DEFAULT_APPROACH, DEFAULT_FREEZE, Recipe
from sparse_export.train.sparse_training import SparseTraining
from sparse_export.train.sparsifier import Sparsifier
from sparse_export.train.sr_ste import SrSte

ASP_CUT = 0.5  # fraction of the steps that asp trains dense


def make_sparsifier(
    recipe: Recipe,
    model: nn.Module,
    optimizer: Optimizer,
    total_steps: int,
    *,
    output_layers: Sequence[str] | None = None,
) -> Sparsifier:
    """By the recipe's method. output_layers: see `SparseTraining`. Raises UsageError, as its class does."""
    settings = recipe.sparsity
    pattern = settings.nm_pattern
    if pattern is not None and settings.method == "sr-ste":
        return SrSte(
            model,
            optimizer,
            pattern=pattern,
            decay=settings.decay,
            keep_dense=settings.keep_dense,
            output_layers=output_layers,
            small_share=settings.small_share,
        )
    asp = settings.method == "asp"
    approach, freeze = settings.approach, settings.freeze
    if asp:
        approach, freeze = (ASP_CUT, ASP_CUT), ASP_CUT
    elif pattern is not None:
        freeze = DEFAULT_FREEZE if freeze is None else freeze
        approach = DEFAULT_APPROACH if approach is None else approach
    return SparseTraining(
        model,
        optimizer,
        density=settings.wanted_density,
        pattern=pattern,
        total_steps=total_steps,
        update_every=settings.update_every or None,
        prune_rate=0.0 if asp else settings.prune_rate,
        final_prune_rate=settings.final_prune_rate,
        prune_schedule=settings.prune_schedule,
        redistribution=settings.redistribution,
        start=settings.start,
        rescale=settings.rescale,
        keep_dense=settings.keep_dense,
        seed=recipe.seed,
        approach=approach or (0.0, 0.0),
        freeze=1.0 if freeze is None else freeze,
        output_layers=output_layers,
        small_share=settings.small_share,
    )
