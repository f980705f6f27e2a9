"""The accuracy of a network in training on a part of the data."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import nn

from sparse_export.formats.run import Accuracy
from sparse_export.tasks.labels import count_correct
from sparse_export.train.batches import BatchLoader, Part
from sparse_export.train.distributed import World
from sparse_export.train.ema import Ema
from sparse_export.train.network import in_memory_format
from sparse_export.train.products import Products
from sparse_export.train.recipe import Recipe

__all__ = ["accuracy"]

_BATCH, _BATCH_VALUES = 1000, 16 * 2**20  # samples, and input values, at most at once


@torch.no_grad()
def accuracy(
    name: Part,
    loader: BatchLoader,
    recipe: Recipe,
    model: nn.Module,
    ema: Ema | None,
    products: Products | None,
    *,
    device: torch.device,
    world: World,
) -> Accuracy | None:
    """Accuracy of the network as it would be saved, in float32, over all processes.

    Args:
        name: of the part.
        loader: of the data.
        recipe: its memory format.
        model: left in eval mode.
        ema: the average that is tested in place of the weights; None for none.
        products: paused meanwhile, where they are not exact.
        device, world: of this process.

    Returns:
        None for an empty part.
    """
    n_samples = loader.info.n_validation if name == "validation" else loader.info.n_test
    if n_samples == 0:
        return None
    model.eval()
    # Batch statistics are each process's own until the next step, or a resumed run, copies those of rank 0.
    world.copy_from_first([value for value in model.buffers() if value.numel()])
    if ema is not None:
        world.copy_from_first(list(ema.average.values()))
    size = max(1, min(_BATCH, _BATCH_VALUES // max(1, math.prod(loader.input_shape))))
    exact = products.paused() if products is not None else nullcontext()
    with ema.swapped_in() if ema else nullcontext(), exact:
        correct = count_correct(lambda x: model(in_memory_format(recipe, x)), loader.part(name, size), device)
    (n_correct,) = world.sum([float(correct)])
    return Accuracy(n_correct=round(n_correct), n_samples=n_samples)
