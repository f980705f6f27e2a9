"""What the record of a run says of it when it starts."""

from __future__ import annotations

import torch
from torch import nn

from sparse_export.formats.run import LayerInfo, ModelInfo, RunInfo
from sparse_export.train.batches import Feed
from sparse_export.train.distributed import World
from sparse_export.train.layers import maskable_parameters
from sparse_export.train.recipe import Recipe
from sparse_export.train.sparsifier import Sparsifier
from sparse_export.version import command_line, library_versions, now

__all__ = ["started_info"]


def started_info(
    recipe: Recipe,
    feed: Feed,
    model: nn.Module,
    sparse: Sparsifier | None,
    layers: tuple[LayerInfo, ...],
    *,
    method: str | None,
    n_outputs: int,
    n_steps: int,
    n_threads: int,
    device: torch.device,
    world: World,
) -> RunInfo:
    """The record, without results. method: by which the run is said to be made; None for the recipe's."""
    weights = maskable_parameters(model)
    n_masked = sparse.n_masked if sparse else sum(value.numel() for value in weights.values())
    return RunInfo(
        status="running",
        method=method or (recipe.sparsity.method if sparse else "dense"),
        model=ModelInfo(name=recipe.model, input_shape=feed.input_shape, n_classes=n_outputs),
        data=feed.fact,
        target_density=sparse.density if sparse else 1.0,
        density=sparse.n_active / n_masked if sparse else 1.0,
        n_active=sparse.n_active if sparse else n_masked,
        n_masked=n_masked,
        n_parameters=sum(value.numel() for value in model.parameters()),
        layers=layers,
        validation=None,
        test=None,
        seed=recipe.seed,
        n_threads=n_threads,
        device=device.type,
        n_processes=world.size,
        epochs=recipe.epochs,
        n_steps=n_steps,
        seconds=0.0,
        recipe=recipe.model_dump(mode="json"),
        versions=library_versions(),
        command=command_line(),
        created=now(),
        files={},
    )
