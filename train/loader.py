"""What training reads data by, and what holds for data of every kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from sparse_export.errors import UsageError
from sparse_export.formats.run import DataInfo
from sparse_export.tasks.shipped import task_named
from sparse_export.train.augment import PADDING
from sparse_export.train.distributed import World
from sparse_export.train.inputs import ModelInputs
from sparse_export.train.recipe import Recipe

__all__ = ["Batch", "BatchLoader", "Part", "checked_targets", "require_croppable", "spans"]

Part = Literal["validation", "test"]
Batch = tuple[ModelInputs, Tensor]
"""Inputs and targets."""


class BatchLoader(Protocol):
    """Batches of a data set. A process gets its own share of everything.

    Attributes:
        info: which data.
        input_shape: of one sample; () where there are several inputs.
        n_outputs: that a network for the targets has; None where they do not tell.
        class_names: name of each class; empty where they have none.
    """

    info: DataInfo
    input_shape: tuple[int, ...]
    n_outputs: int | None
    class_names: tuple[str, ...]

    def sample(self, n: int) -> ModelInputs:
        """Inputs like those of a batch, on its device: zeros; of named inputs samples of the data."""
        ...

    def training(self, order: Tensor, batch_size: int, epoch: int, first: int) -> Iterator[Batch]:
        """Inputs and labels of the batches of one epoch.

        Args:
            order: int64, places in the training part.
            batch_size: over all processes; a last, smaller batch is left out.
            epoch: from 0.
            first: number of the first batch.
        """
        ...

    def part(self, name: Part, size: int) -> Iterator[Batch]:
        """All samples of another part in order, `size` at a time."""
        ...

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        """The smallest and largest value of each input of integers, of what was read so far."""
        ...


def require_croppable(recipe: Recipe, shape: tuple[int, ...]) -> None:
    """Raise UsageError for crops of inputs that are no images of their size."""
    if recipe.augment == "crop-flip" and (len(shape) != 3 or min(shape[1:]) <= PADDING):
        raise UsageError(
            f"augment = 'crop-flip' cannot be done to inputs of shape {shape} from {recipe.data}.",
            expected=f"Images (C, H, W) higher and wider than {PADDING} were expected.",
            do="Leave augment out of the recipe.",
        )


def checked_targets(recipe: Recipe, targets: Any) -> int | None:
    """The number of outputs that targets tell. Raises UsageError where they do not fit the task."""
    task = task_named(recipe.task)
    if not isinstance(targets, np.ndarray):
        return None
    problem = task.problem(targets, None)
    if problem is not None:
        raise UsageError(
            f"The targets of {recipe.data} {problem}.",
            do=f"Give targets of the task {recipe.task}, or name another task.",
        )
    return task.n_outputs(torch.from_numpy(targets))


def spans(n: int, size: int, world: World) -> Iterator[tuple[int, int]]:
    """This process's share of 0 .. n in stretches of at most `size`."""
    first, last = n * world.rank // world.size, n * (world.rank + 1) // world.size
    for start in range(first, last, size):
        yield start, min(start + size, last)
