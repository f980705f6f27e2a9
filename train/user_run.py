"""The run folder of a network that a user's own loop trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparse_export.errors import UsageError
from sparse_export.files import staged_folder
from sparse_export.formats.run import Accuracy, ModelInfo, Run, RunInfo
from sparse_export.models.modes import modes_kept
from sparse_export.train.run_folder import claimed_run, finish_run, require_empty
from sparse_export.version import command_line, library_versions, now

if TYPE_CHECKING:
    from sparse_export.train.sparse_training import SparseTraining

__all__ = ["SeenShapes", "save_user_run"]


class SeenShapes:
    """What one sample of a network looks like, by the first batch that goes through it.

    input_shape: of a sample.  n_classes: outputs per sample along the last axis, one where there is no axis but that of
    the batch. Both None before.
    """

    def __init__(self, model: nn.Module) -> None:
        self.input_shape: tuple[int, ...] | None = None
        self.n_classes: int | None = None
        self._hook = model.register_forward_hook(self._note)

    def _note(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Remember it, once. Never within torch.compile."""
        if torch.compiler.is_compiling():
            return
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            self.input_shape = tuple(inputs[0].shape[1:])
            self.n_classes = _n_outputs(output)
        self._hook.remove()


def save_user_run(
    folder: Path,
    trainer: SparseTraining,
    seen: SeenShapes,
    *,
    model: str | None,
    input_shape: Sequence[int] | None,
    test: Accuracy | None,
) -> Run:
    """Write it, as `SparseTraining.run` says."""
    shape = tuple(input_shape) if input_shape is not None else seen.input_shape
    if shape is None:
        raise UsageError(
            "The network has not seen a tensor yet, so the shape of its input is not known.",
            do="Give input_shape, for example input_shape=(1, 28, 28).",
        )
    if seen.n_classes is None:
        seen.n_classes = _n_classes(trainer.model, shape, next(iter(trainer.masks)))
    info = _info(trainer, ModelInfo(name=model, input_shape=shape, n_classes=seen.n_classes), test)
    with claimed_run(folder):
        require_empty(folder)
        with staged_folder(folder) as stage:
            run = finish_run(stage, trainer.model, trainer.masks, info)
    return replace(run, path=folder)


@torch.no_grad()
def _n_classes(model: nn.Module, input_shape: tuple[int, ...], weight_name: str) -> int:
    """Outputs per sample, see `SeenShapes`. Raises UsageError when that is no tensor."""
    weight = model.get_parameter(weight_name)
    probe = torch.zeros((1, *input_shape), dtype=weight.dtype, device=weight.device)
    with modes_kept(model):
        output = model.eval()(probe)
    if not isinstance(output, Tensor):
        raise UsageError(
            f"The network answers with {type(output).__name__}.",
            expected="One tensor of logits was expected.",
            do="Wrap it in a module that returns its logits alone.",
        )
    return _n_outputs(output)


def _n_outputs(output: Tensor) -> int:
    return output.shape[-1] if output.ndim > 1 else 1


def _info(trainer: SparseTraining, model: ModelInfo, test: Accuracy | None) -> RunInfo:
    facts = trainer.layer_facts()
    return RunInfo(
        status="running",
        method=trainer.method,
        model=model,
        data=None,
        target_density=trainer.density,
        density=trainer.density_now,
        n_active=sum(fact.n_active for fact in facts if fact.masked),
        n_masked=trainer.n_masked,
        n_parameters=sum(value.numel() for value in trainer.model.parameters()),
        layers=facts,
        validation=None,
        test=test,
        seed=trainer.seed,
        n_threads=torch.get_num_threads(),
        device=str(next(iter(trainer.masks.values())).device),
        epochs=0,
        n_steps=trainer.n_steps,
        seconds=0.0,
        recipe={},
        versions=library_versions(),
        command=command_line(),
        created=now(),
        files={},
    )
