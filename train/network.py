"""The network of a training run: made as its recipe says, and checked with its data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparse_export import models
from sparse_export.errors import UsageError
from sparse_export.graph.attention import attention_in_parts
from sparse_export.graph.example import Example, make_example
from sparse_export.graph.weight_uses import why_no_axis
from sparse_export.signature import BATCH
from sparse_export.tasks.labels import require_outputs
from sparse_export.tasks.shipped import Classification, task_named
from sparse_export.train.distributed import World
from sparse_export.train.inputs import ModelInputs, called, each, tensors_of
from sparse_export.train.layers import maskable_parameters, output_layers
from sparse_export.train.recipe import Recipe

__all__ = [
    "Outputs",
    "in_memory_format",
    "make_network",
    "n_threads_for",
    "named_example",
    "not_reduced",
    "require_fit",
    "wrapped_for_training",
]

_SINGLE_THREAD_WORK = 50e6  # weights x batch size; see n_threads_for


def make_network(recipe: Recipe, n_outputs: int | None, device: torch.device, world: World) -> nn.Module:
    """Fresh weights, from torch's own generator, on the device and in the memory format of the recipe."""
    model = models.create(recipe.model, n_outputs)
    if recipe.sync_batch_norm and world.size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(device)
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model


def in_memory_format(recipe: Recipe, x: ModelInputs) -> ModelInputs:
    """Inputs in the memory format of the recipe."""

    def formatted(one: Tensor) -> Tensor:
        return one.contiguous(memory_format=torch.channels_last) if one.ndim == 4 else one

    return each(x, formatted) if recipe.channels_last else x


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """The outputs of a network.

    Args:
        n: numbers a sample, of one output (samples, numbers); None of others.
        layers: the weights of the layer that gives them.
        unfit: weights that no pattern can hold in, see `why_no_axis`; empty where no pattern is asked for.
    """

    n: int | None
    layers: tuple[str, ...]
    unfit: Mapping[str, str]


def require_fit(
    model: nn.Module,
    recipe: Recipe,
    sample: ModelInputs,
    n_outputs: int | None,
) -> Outputs:
    """Run two samples through the network. Lazy layers have shapes from here on.

    Args:
        model: changed to eval mode.
        recipe: its names are in the errors.
        sample: two samples, on the device of the network.
        n_outputs: that the targets tell; of classes at most as many as the network has logits.

    Raises:
        UsageError: the network cannot take this data.
    """
    model.eval()
    try:
        sample = in_memory_format(recipe, sample)
        with torch.no_grad(), attention_in_parts():
            output = called(model, sample)
            layers = output_layers(model, lambda: called(model, sample))
    except Exception as cause:  # whatever a network raises: some assert, some index
        reason = next(iter(str(cause).splitlines()), type(cause).__name__)
        raise UsageError(
            f"The model {recipe.model} cannot take {_described(sample)} from {recipe.data}: {reason}.",
            expected=f"{_taken_by(model)} was expected.",
            do="Give inputs of the names, types and shapes that forward takes, or choose another model.",
        ) from cause
    if isinstance(task_named(recipe.task), Classification):
        if isinstance(output, Tensor) and output.ndim == 2:
            require_outputs(
                output.shape[1],
                f"The model {recipe.model}",
                do=(
                    "Choose a model with one output per class, two for yes or no, and data with two classes "
                    "or more."
                ),
            )
        if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[-1] < (n_outputs or 0):
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UsageError(
                f"The model {recipe.model} returns {got} for two inputs.",
                expected=f"Logits of shape (2, {n_outputs}) were expected for {recipe.data}.",
                do="Choose a model with as many outputs as there are classes.",
            )
    has_pattern = recipe.sparsity.pattern is not None
    example = named_example(model, recipe, sample) or cast(Tensor, sample)
    unfit = why_no_axis(model, example, list(maskable_parameters(model))) if has_pattern else {}
    n = output.shape[-1] if isinstance(output, Tensor) and output.ndim == 2 else None
    return Outputs(n=n, layers=layers, unfit=unfit)


def named_example(model: nn.Module, recipe: Recipe, x: ModelInputs) -> Example | None:
    """The call of a network with named inputs; None for one with a single tensor.

    Args:
        model: the network.
        recipe: whose factory may have `free_sizes` beside it, see `sparse_export.graph.free_axes.FreeSizes`;
            else the number of samples alone is free.
        x: two samples.
    """
    if not isinstance(x, dict):
        return None
    beside = models.example_beside(recipe.model) if models.is_factory(recipe.model) else None
    sizes = None if beside is None else beside[1]
    batch: dict[str, tuple[str | None, ...]] = {
        name: (BATCH, *[None] * (one.dim() - 1)) for name, one in x.items()
    }
    return make_example(model, (), x, free_sizes=sizes or batch)


def _described(x: ModelInputs) -> str:
    """Types and shapes of one sample, for a message."""

    def one(tensor: Tensor) -> str:
        return f"of shape {tuple(tensor.shape[1:])} and type {str(tensor.dtype).removeprefix('torch.')}"

    if isinstance(x, dict):
        return "the inputs " + ", ".join(f"{name} {one(tensor)}" for name, tensor in x.items())
    return f"inputs {one(tensors_of(x)[0])}"


def _taken_by(model: nn.Module) -> str:
    """What forward is called with, like `forward(ids, mask=None)`."""
    return f"{type(model).__name__}.forward{inspect.signature(model.forward)}"


def wrapped_for_training(
    model: nn.Module, recipe: Recipe, device: torch.device, world: World
) -> Callable[..., Any]:
    """The network wrapped for training: by DistributedDataParallel and torch.compile, where needed."""
    forward: Any = model
    if world.size > 1:
        forward = nn.parallel.DistributedDataParallel(
            forward, device_ids=[device.index] if device.type == "cuda" else None
        )
    compiled: Any = torch.compile(forward) if recipe.compile else forward
    return cast(Callable[..., Any], compiled)


def not_reduced(forward: Any) -> AbstractContextManager[None]:
    """A backward pass whose gradients the processes do not exchange yet. forward: as it was wrapped."""
    parallel = getattr(forward, "_orig_mod", forward)
    if isinstance(parallel, nn.parallel.DistributedDataParallel):
        return parallel.no_sync()
    return nullcontext()


def n_threads_for(model: nn.Module, batch_size: int) -> int:
    """One thread for a network whose step is too short to share, else torch's own choice.

    A function of the network, not of a timing, so that a recipe gives the same bits on every run.
    """
    n_weights = sum(value.numel() for value in model.parameters())
    return 1 if n_weights * batch_size <= _SINGLE_THREAD_WORK else torch.get_num_threads()
