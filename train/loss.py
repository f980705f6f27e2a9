"""The loss of a recipe: that of its task, or a user's function of outputs and targets."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from sparse_export import models
from sparse_export.errors import UsageError
from sparse_export.tasks.shipped import Classification, task_named
from sparse_export.train.recipe import CROSS_ENTROPY, Recipe

__all__ = ["Loss", "loss_of"]

Loss = Callable[[Tensor, Tensor], Tensor]
"""The mean loss of a batch, a scalar, of the network's outputs and the targets."""


def loss_of(recipe: Recipe, *, label_smoothing: float = 0.0) -> Loss:
    """The loss that a recipe names.

    Args:
        recipe: its `loss`, whose module is imported where it is a user's.
        label_smoothing: of cross-entropy.

    Raises:
        UsageError: the function cannot be imported; when it is called, it does not give a scalar.
    """
    task = task_named(recipe.task)
    if recipe.loss == CROSS_ENTROPY or (not recipe.loss and isinstance(task, Classification)):
        return lambda outputs, targets: nn.functional.cross_entropy(
            outputs, targets, label_smoothing=label_smoothing
        )
    function = models.function_named(recipe.loss) if recipe.loss else task.loss
    name = recipe.loss or f"of the task {recipe.task}"

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        found = function(outputs, targets)
        if not isinstance(found, Tensor) or found.ndim:
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise UsageError(
                f"The loss {name} gives {got} for outputs of shape {tuple(getattr(outputs, 'shape', ()))}.",
                expected="A scalar tensor, the mean over the samples, was expected.",
            )
        return found

    return loss
