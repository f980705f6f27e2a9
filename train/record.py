"""The record of a run, before anything is written: what every kind of run says in `run.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparse_export.errors import UsageError
from sparse_export.formats.run import (
    CLASSIFICATION,
    CallInfo,
    CostInfo,
    DataInfo,
    DenseInfo,
    LayerInfo,
    ModelInfo,
    RunInfo,
    TaskInfo,
)
from sparse_export.formats.score import Score
from sparse_export.signature import Signature
from sparse_export.version import command_line, library_versions, now

__all__ = ["n_entries", "new_run_info"]


def n_entries(network: nn.Module) -> int:
    """Count the entries of all parameters of a network."""
    return sum(value.numel() for value in network.parameters())


def new_run_info(
    *,
    n_parameters: int,
    method: str,
    model: ModelInfo,
    signature: Signature,
    data: DataInfo | None,
    layers: tuple[LayerInfo, ...],
    seed: int,
    n_threads: int,
    device: str,
    n_active: int | None = None,
    target_density: float | None = None,
    validation: Score | None = None,
    test: Score | None = None,
    n_processes: int = 1,
    epochs: int = 0,
    n_steps: int = 0,
    seconds: float = 0.0,
    recipe: Mapping[str, Any] | None = None,
    task: TaskInfo = CLASSIFICATION,
    dense: DenseInfo | None = None,
    call: CallInfo | None = None,
    cost: CostInfo | None = None,
) -> RunInfo:
    """The record of a run that is not finished yet, by this process at this moment.

    Args:
        n_parameters: entries of all parameters.
        method: of the record, for example the name of a recipe's method.
        model: how the network is made again.
        signature: what it takes and gives.
        data: what it was trained on, if that is known.
        layers: every maskable weight, see `sparse_export.train.layers.layer_facts`.
        seed: of everything that is drawn.
        n_threads: of torch, on the CPU.
        device: as torch writes it.
        n_active: active weights of the masked layers at the end of the training; None for those of `layers`.
        target_density: that is wanted; None for the density.
        validation, test: score on these parts; None where it was not measured.
        n_processes: that train together.
        epochs, n_steps: of the whole training.
        seconds: wall time so far.
        recipe: of the training, as its document has it.
        task: what the network is for.
        dense: the dense network that it was made from.
        call: how forward takes the inputs, where that is not by position alone.
        cost: of the training, by its masks, where it is known already.

    Returns:
        The record with status `running` and no files. A network without masked layers counts as dense.

    Raises:
        UsageError: a score is not a `Score`.
    """
    for name, score in (("validation", validation), ("test", test)):
        if score is not None and not isinstance(score, Score):
            raise UsageError(
                f"{name} is {score!r}, which does not say what it is a score of.",
                do=f"Give {name}=Score(n_correct=..., n_samples=...), of sparse_export.formats.score, or "
                "Score(name=..., value=..., n_samples=..., is_share=...).",
            )
    masked = [layer for layer in layers if layer.masked] or layers
    n_masked = sum(layer.n_weights for layer in masked)
    if n_active is None:
        n_active = sum(layer.n_active for layer in masked)
    density = n_active / n_masked
    return RunInfo(
        status="running",
        method=method,
        model=model,
        signature=signature,
        data=data,
        target_density=density if target_density is None else target_density,
        density=density,
        n_active=n_active,
        n_masked=n_masked,
        n_parameters=n_parameters,
        layers=layers,
        validation=validation,
        test=test,
        seed=seed,
        n_threads=n_threads,
        device=device,
        n_processes=n_processes,
        epochs=epochs,
        n_steps=n_steps,
        seconds=seconds,
        recipe=dict(recipe or {}),
        versions=library_versions(),
        command=command_line(),
        created=now(),
        files={},
        task=task,
        dense=dense,
        call=call,
        cost=cost,
    )
