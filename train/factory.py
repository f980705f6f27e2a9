"""What keeps a network sparse, by the method that a recipe names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_export.train.recipe import Recipe
from sparse_export.train.sparse_training import SparseTraining
from sparse_export.train.sparsifier import Sparsifier

__all__ = ["make_sparsifier"]


def make_sparsifier(
    recipe: Recipe,
    model: nn.Module,
    optimizer: Optimizer,
    total_steps: int,
    *,
    output_layers: Sequence[str] | None = None,
    first_loss: Callable[[], Tensor] | None = None,
    combine: Callable[[Tensor], object] | None = None,
    unfit: Mapping[str, str] | None = None,
) -> Sparsifier:
    """What trains by the recipe's method.

    Args:
        recipe: of a sparse training.
        model: on the device that it is trained on.
        optimizer: over its parameters.
        total_steps: length of the training.
        output_layers: weights that give the outputs; None for those of the layer registered last.
        first_loss: of the first batch, for methods that draw their masks from it; without it they are
            refused.
        combine: sums a gradient over several processes, in place; None for one process.
        unfit: weights that no pattern can hold in, each with the reason.

    Raises:
        UsageError: as the classes do.
    """
    config = recipe.sparsity
    rule = config.rule
    if rule.sparsifier is not None and config.pattern is not None:
        made: Sparsifier = rule.sparsifier(
            model,
            optimizer,
            pattern=config.pattern,
            decay=config.decay,
            keep_dense=config.keep_dense,
            output_layers=output_layers,
            small_share=config.small_share,
            unfit=unfit,
        )
        return made
    masks = None
    if rule.first_masks is not None and first_loss is not None:
        masks = rule.first_masks(
            model,
            first_loss,
            density=config.wanted_density or 1.0,
            keep_dense=config.keep_dense,
            combine=combine,
        )
    return SparseTraining.from_config(
        model,
        optimizer,
        config,
        total_steps=total_steps,
        seed=recipe.seed,
        output_layers=output_layers,
        masks=masks,
        unfit=unfit,
    )
