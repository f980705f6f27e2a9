"""The run folder of a network that a user's own loop trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_export.errors import UsageError
from sparse_export.files import staged_folder
from sparse_export.formats.run import AGREEMENT, CLASSIFICATION, ModelInfo, Run, RunInfo
from sparse_export.graph.example import Example, FreeSizes, as_example, example_of_shape, make_example
from sparse_export.graph.named_network import signature_of_call
from sparse_export.models.modes import modes_kept
from sparse_export.signature import Signature
from sparse_export.train.run_folder import claimed_run, finish_run, require_empty

__all__ = ["FreeSizes", "GivenShapes", "SeenCall", "save_user_run"]

_SAMPLES = 2  # that are kept of the first batch


class SeenCall:
    """What a network was called with first.

    Attributes:
        call: positional and keyword arguments, two samples of each tensor; None before the first batch.
    """

    def __init__(self, model: nn.Module) -> None:
        self.call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._hook = model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember it, once. Never within torch.compile."""
        if torch.compiler.is_compiling():
            return
        self.call = tuple(map(_some, args)), {name: _some(value) for name, value in kwargs.items()}
        self._hook.remove()


@dataclass(frozen=True, kw_only=True)
class GivenShapes:
    """What a caller tells of a network's inputs.

    Attributes:
        input_shape: of one sample, of a network with one input of floats; None for what was seen.
        free_sizes: names of the axes of inputs, see `sparse_export.graph.example.make_example`.
    """

    input_shape: Sequence[int] | None
    free_sizes: FreeSizes | None


def _some(value: Any) -> Any:
    """An argument with two samples of each tensor, detached and copied."""
    if isinstance(value, Tensor):
        return value[:_SAMPLES].detach().clone() if value.dim() else value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _some(one) for key, one in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_some, value))
    return type(value)(map(_some, value)) if type(value) in (tuple, list) else value


def save_user_run(
    folder: Path,
    model: nn.Module,
    masks: Mapping[str, Tensor],
    seen: SeenCall,
    record: Callable[..., RunInfo],
    shapes: GivenShapes,
    *,
    name: str | None,
) -> Run:
    """Write a network as a finished run.

    Args:
        folder: new or empty.
        model, masks: what is written.
        seen: by the network.
        record: makes that of the run, given `model`, the name, `signature` and `task` of the network.
        shapes: what the caller told of the inputs.
        name: by which the network can be made again, if any.

    Raises:
        UsageError: the inputs are not known, an inactive weight is not 0, or the folder holds something.
        OutputError: it cannot be written.
    """
    signature = _signature(model, next(iter(masks)), seen, shapes)
    _require_masked(model, masks)
    task = AGREEMENT if signature.n_classes is None else CLASSIFICATION
    info = record(model=ModelInfo(name=name), signature=signature, task=task)
    with claimed_run(folder):
        require_empty(folder)
        with staged_folder(folder) as stage:
            run = finish_run(stage, model, masks, info)
    return replace(run, path=folder)


def _signature(model: nn.Module, weight: str, seen: SeenCall, shapes: GivenShapes) -> Signature:
    parameter = model.get_parameter(weight)
    if shapes.input_shape is not None:
        whole = example_of_shape(shapes.input_shape)
        example = whole.with_tensors({key: one.to(parameter.dtype) for key, one in whole.tensors.items()})
    elif seen.call is not None:
        example = _two_samples(model, seen.call, shapes.free_sizes)
    else:
        raise UsageError(
            "The network has not seen a tensor yet, so the shape of its input is not known.",
            do="Give input_shape, for example input_shape=(1, 28, 28).",
        )
    with modes_kept(model):
        return signature_of_call(model.eval(), example.on(parameter.device))


def _two_samples(
    model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]], free_sizes: FreeSizes | None
) -> Example:
    """The call that was seen, as an example; of one sample, its first axis repeated."""
    args, kwargs = call
    example = make_example(model, args, kwargs, free_sizes=free_sizes)
    if len(example.tensors) == 1:
        (tensor,) = example.tensors.values()
        if free_sizes is None and tensor.dim() and tensor.is_floating_point():
            if tensor.shape[0] < _SAMPLES:
                tensor = torch.cat([tensor, tensor])
            alone = as_example(tensor)  # called `input`, as that of an exported classifier is
            return replace(example, tensors=alone.tensors, axes=alone.axes)
    return example


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
