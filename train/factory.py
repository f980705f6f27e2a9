"""What keeps a network sparse, by the method that a recipe names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_export.train.methods import METHODS
from sparse_export.train.recipe import DEFAULT_APPROACH, Recipe
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
    sensitivity_masks: Callable[[], dict[str, Tensor]] | None = None,
) -> Sparsifier:
    """By the recipe's method. output_layers: see `SparseTraining`.

    sensitivity_masks: the masks that `snip` starts from, see `snip_masks`; without it snip is refused.
    Raises UsageError, as the classes do.
    """
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
    elif pattern is not None and METHODS[settings.method].moves:
        freeze = settings.wanted_freeze
        approach = DEFAULT_APPROACH if approach is None else approach
    masks = sensitivity_masks() if settings.method == "snip" and sensitivity_masks is not None else None
    return SparseTraining(
        model,
        optimizer,
        density=settings.wanted_density if masks is None else None,
        method="sparse-momentum" if asp else settings.method,
        masks=masks,
        pattern=pattern,
        total_steps=total_steps,
        update_every=settings.update_every or None,
        prune_rate=0.0 if asp else settings.prune_rate,
        final_prune_rate=settings.final_prune_rate,
        prune_schedule=settings.prune_schedule,
        prune=settings.prune,
        redistribution=settings.redistribution,
        growth=settings.growth,
        start=settings.start,
        rescale=settings.rescale,
        keep_dense=settings.keep_dense,
        seed=recipe.seed,
        approach=approach or (0.0, 0.0),
        freeze=freeze,
        output_layers=output_layers,
        small_share=settings.small_share,
        transposable=settings.transposable,
    )
