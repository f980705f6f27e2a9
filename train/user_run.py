"""The run folder of a network that a user's own loop trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_export.errors import UsageError
from sparse_export.files import staged_folder
from sparse_export.formats.run import ModelInfo, Run, RunInfo
from sparse_export.models.modes import modes_kept
from sparse_export.signature import class_signature
from sparse_export.train.run_folder import claimed_run, finish_run, require_empty

__all__ = ["SeenShapes", "save_user_run"]


class SeenShapes:
    """The shapes of one sample, by the first batch that goes through a network.

    Attributes:
        input_shape: of a sample; None before that batch.
        n_classes: entries of the last axis of the network's output, 1 where the batch is its only axis; None
            before that batch.
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
    model: nn.Module,
    masks: Mapping[str, Tensor],
    seen: SeenShapes,
    record: Callable[..., RunInfo],
    *,
    name: str | None,
    input_shape: Sequence[int] | None,
) -> Run:
    """Write a network as a finished run.

    Args:
        folder: new or empty.
        model, masks: what is written.
        seen: by the network.
        record: makes that of the run, given `model`, the name and the shapes of the network.
        name: by which the network can be made again, if any.
        input_shape: of one sample; None for that which was seen.

    Raises:
        UsageError: the shape is not known, an inactive weight is not 0, or the folder holds something.
        OutputError: it cannot be written.
    """
    shape = tuple(input_shape) if input_shape is not None else seen.input_shape
    if shape is None:
        raise UsageError(
            "The network has not seen a tensor yet, so the shape of its input is not known.",
            do="Give input_shape, for example input_shape=(1, 28, 28).",
        )
    if seen.n_classes is None:
        seen.n_classes = _n_classes(model, shape, next(iter(masks)))
    _require_masked(model, masks)
    info = record(model=ModelInfo(name=name), signature=class_signature(shape, seen.n_classes))
    with claimed_run(folder):
        require_empty(folder)
        with staged_folder(folder) as stage:
            run = finish_run(stage, model, masks, info)
    return replace(run, path=folder)


def _require_masked(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Raise UsageError where an inactive weight is not 0: what was scored would not be written."""
    for name, mask in masks.items():
        n_wrong = int(torch.count_nonzero(model.get_parameter(name).detach()[~mask]))
        if n_wrong:
            raise UsageError(
                f"{n_wrong} inactive weights of {name} are not 0: the network is not the one that its masks "
                "describe, and its score is that of another network.",
                do="Train with `trainer.step()` in place of `optimizer.step()`, or call "
                "`trainer.apply_masks()` after every step; then measure again.",
            )


@torch.no_grad()
def _n_classes(model: nn.Module, input_shape: tuple[int, ...], weight_name: str) -> int:
    """Outputs per sample, see `SeenShapes`. Raises UsageError where that is no tensor."""
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
