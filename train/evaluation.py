"""The score of a network in training on a part of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparse_export.formats.score import Score
from sparse_export.graph.attention import attention_in_parts
from sparse_export.graph.named_network import named_tensors
from sparse_export.tasks.labels import count_correct
from sparse_export.tasks.shipped import Classification, task_named
from sparse_export.tasks.task import Statistics, Task
from sparse_export.train.distributed import World
from sparse_export.train.ema import Ema
from sparse_export.train.inputs import ModelInputs, called, tensors_of
from sparse_export.train.loader import BatchLoader, Part
from sparse_export.train.network import in_memory_format
from sparse_export.train.products import Products
from sparse_export.train.recipe import Recipe

__all__ = ["score_of_part", "statistics_of"]

_BATCH, _BATCH_VALUES = 1000, 16 * 2**20  # samples, and input values, at most at once


@torch.no_grad()
def score_of_part(
    name: Part,
    loader: BatchLoader,
    recipe: Recipe,
    model: nn.Module,
    ema: Ema | None,
    products: Products | None,
    *,
    device: torch.device,
    world: World,
) -> Score | None:
    """Score of the network as it would be saved, in float32, over all processes.

    Args:
        name: of the part.
        loader: of the data.
        recipe: its task and memory format.
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
    n_values = sum(one.numel() for one in tensors_of(loader.sample(1)))
    size = max(1, min(_BATCH, _BATCH_VALUES // max(1, n_values)))
    exact = products.paused() if products is not None else nullcontext()
    task = task_named(recipe.task)
    with ema.swapped_in() if ema else nullcontext(), exact, attention_in_parts():

        def network(x: ModelInputs) -> Any:
            return called(model, in_memory_format(recipe, x))

        if isinstance(task, Classification) and task.top == 1:  # nothing is read from the device meanwhile
            correct = count_correct(network, loader.part(name, size), device)
            (n_correct,) = world.sum([float(correct)])
            return Score(n_correct=round(n_correct), n_samples=n_samples)
        own = statistics_of(task, network, loader.part(name, size))
    return task.score(np.concatenate(world.gather(own)))


def statistics_of(
    task: Task, network: Callable[[Any], Any], batches: Iterable[tuple[Any, Tensor]]
) -> Statistics:
    """The statistics of samples that a torch network is run on.

    Args:
        task: whose score they are for.
        network: gives a tensor, or tuples, mappings and dataclasses of tensors.
        batches: inputs and targets.

    Returns:
        float64 (n, k); (0, 1) without batches.

    Raises:
        UsageError: outputs that the task cannot score.
    """
    found = []
    for x, y in batches:
        outputs = network(x)
        named = {"output": outputs} if isinstance(outputs, Tensor) else named_tensors(outputs)
        arrays = {name: one.detach().float().cpu().numpy() for name, one in named.items()}
        found.append(task.statistics(arrays, y.cpu().numpy()))
    return np.concatenate(found) if found else np.zeros((0, 1))
