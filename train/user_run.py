"""The run folder of a network that a user's own loop trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparse_export import models
from sparse_export.errors import UsageError
from sparse_export.files import staged_folder
from sparse_export.formats.run import (
    AGREEMENT,
    CLASSIFICATION,
    DataInfo,
    LayerInfo,
    ModelInfo,
    Run,
    RunInfo,
    TaskInfo,
)
from sparse_export.formats.score import Score
from sparse_export.graph.call_record import call_of
from sparse_export.graph.example import Example, example_of_shape
from sparse_export.graph.example_sources import example_from_function, example_from_seen
from sparse_export.graph.free_axes import FreeSizes
from sparse_export.graph.named_network import signature_of_call
from sparse_export.models.lazy import give_shapes
from sparse_export.models.modes import modes_kept
from sparse_export.models.run_network import differences
from sparse_export.signature import Signature
from sparse_export.tasks.named_data import open_named
from sparse_export.tasks.samples import labelled
from sparse_export.tasks.shipped import task_named
from sparse_export.train.evaluated_weights import unused_weights
from sparse_export.train.run_folder import claimed_run, finish_run, require_empty

__all__ = ["FreeSizes", "GivenShapes", "SeenCall", "save_user_run", "tensors_in"]

_BATCH = 100  # samples of a call that is scored
_SAMPLES = 2  # that are kept of a large first batch
_KEPT_VALUES = 2**20  # of a batch that is kept whole

_Call = tuple[tuple[Any, ...], dict[str, Any]]


class SeenCall:
    """What a network was called with first.

    A compiled network has the hook in its graph, which can neither copy the arguments nor end: it leaves them
    at each call, and `settle` copies those of the first.
    """

    def __init__(self, model: nn.Module) -> None:
        self._call: _Call | None = None
        self._compiled: _Call | None = None
        self._hook = model.register_forward_pre_hook(self._note, with_kwargs=True)

    @property
    def call(self) -> _Call | None:
        """Positional and keyword arguments, of large ones two samples; None before the first batch."""
        self.settle()
        return self._call

    def settle(self) -> None:
        """Copy what a compiled network left, once, and hold it no longer."""
        left, self._compiled = self._compiled, None
        if left is not None and self._call is None:
            self._call = _kept(*left)
            self._hook.remove()

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_exporting():
            return
        if torch.compiler.is_compiling():
            self._compiled = (args, kwargs)
            return
        self._call = _kept(args, kwargs)
        self._hook.remove()


def _kept(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    """A copy of the arguments; of large ones a few samples.

    Samples are what the first axis counts, of all tensors that are as long there as the first one.
    """
    found = list(tensors_in((args, kwargs)))
    first = next((one for one in found if one.dim()), None)
    length = None if first is None else first.shape[0]
    most = None if sum(one.numel() for one in found) <= _KEPT_VALUES else _SAMPLES

    def kept(value: Any) -> Any:
        if isinstance(value, Tensor):
            part = value[:most] if value.dim() and value.shape[0] == length else value
            return part.detach().clone()
        if isinstance(value, Mapping):
            return {key: kept(one) for key, one in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(kept, value))
        return type(value)(map(kept, value)) if type(value) in (tuple, list) else value

    return tuple(map(kept, args)), {name: kept(value) for name, value in kwargs.items()}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in arguments or outputs: in mappings, tuples and lists too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, tuple | list):
        for one in value:
            yield from tensors_in(one)


@dataclass(frozen=True)
class GivenShapes:
    """What a caller tells of a network's inputs.

    Attributes:
        input_shape: of one sample, of a network with one input of floats; None for what was seen.
        example_inputs: a call, see `sparse_export.graph.example_sources.example_from_function`; None for the
            one beside the factory that makes the network, else for what was seen.
        free_sizes: names of the axes of inputs, see `sparse_export.graph.example.make_example`.
        test: score on the test set, None for that on data, if these are given.
        task: what the network is for.
        data: what it is scored on.
    """

    input_shape: Sequence[int] | None
    example_inputs: Callable[[], Any] | None
    free_sizes: FreeSizes | None
    test: Score | None = None
    task: str | None = None
    data: str | None = None


def save_user_run(
    folder: Path,
    model: nn.Module,
    masks: Mapping[str, Tensor],
    seen: SeenCall,
    layers: Sequence[LayerInfo],
    record: Callable[..., RunInfo],
    shapes: GivenShapes,
    *,
    name: str | None,
) -> Run:
    """Write a network as a finished run.

    Args:
        folder: new or empty.
        model, masks: what is written. Masks of weights that evaluation does not use are left out.
        seen: by the network.
        layers: the record of each.
        record: makes that of the run, given `model`, the name, `layers`, `signature`, `task` and `call`.
        shapes: what the caller told of the inputs.
        name: by which the network can be made again, if any.

    Raises:
        UsageError: the inputs are not known, `name` makes another network, an inactive weight is not 0, or
            the folder holds something.
        OutputError: it cannot be written.
    """
    device = model.get_parameter(next(iter(masks))).device
    example = _example(model, next(iter(masks)), seen, shapes, name)
    if shapes.task is not None:
        example = replace(example, lone_output=task_named(shapes.task).output_name)
    with modes_kept(model):
        signature = signature_of_call(model.eval(), example.on(device))
        if name is not None:
            _require_made_by(name, model, signature)
        data, test = _scored(model, example, signature, shapes, device)
        placed = example.on(device)
        spare = unused_weights(model, lambda: list(tensors_in(placed.call(model))), list(masks))
    _require_masked(model, masks)
    masks = {key: mask for key, mask in masks.items() if key not in spare}
    task = CLASSIFICATION if (signature.n_classes or 0) > 1 else AGREEMENT
    info = record(
        model=ModelInfo(name=name),
        layers=tuple(_dense(one) if one.name in spare else one for one in layers),
        signature=signature,
        task=task if shapes.task is None else TaskInfo(name=shapes.task),
        data=data,
        test=test,
        call=call_of(example),
    )
    with claimed_run(folder):
        require_empty(folder)
        with staged_folder(folder) as stage:
            run = finish_run(stage, model, masks, info)
    return replace(run, path=folder)


@torch.no_grad()
def _scored(
    model: nn.Module, example: Example, signature: Signature, shapes: GivenShapes, device: torch.device
) -> tuple[DataInfo | None, Score | None]:
    """The record of the data that the caller named, and the score on them. Raises UsageError."""
    if shapes.data is None or shapes.task is None:
        if shapes.data is not None:
            raise UsageError(
                f"data is {shapes.data!r}, and no task is given.",
                expected="What the network is for was expected, like task='regression'.",
            )
        return None, shapes.test
    task = task_named(shapes.task)
    data = open_named(shapes.data, signature, None)
    test = labelled(
        data.samples,
        data.targets,
        task,
        signature,
        of=shapes.data,
        network="The network",
        do="Name another task.",
    )
    found, start = [], 0
    for feeds in data.samples.batches(_BATCH):
        n = signature.n_samples(feeds)
        outputs = tensors_in(
            example.call(model, [torch.from_numpy(feeds[name]).to(device) for name in example.tensors])
        )
        arrays = {
            name: one.float().cpu().numpy() for name, one in zip(signature.output_names, outputs, strict=True)
        }
        found.append(task.statistics(arrays, test.targets[start : start + n]))
        start += n
    score = task.score(np.concatenate(found))
    return data.info(), shapes.test or score


def _example(model: nn.Module, weight: str, seen: SeenCall, shapes: GivenShapes, name: str | None) -> Example:
    """How the network is called. Raises UsageError."""
    if shapes.input_shape is not None:
        whole = example_of_shape(shapes.input_shape)
        dtype = model.get_parameter(weight).dtype
        return whole.with_tensors({key: one.to(dtype) for key, one in whole.tensors.items()})
    own = models.example_beside(name) if name is not None and models.is_factory(name) else None
    function = shapes.example_inputs or (None if own is None else own[0])
    if function is not None:
        sizes = shapes.free_sizes or (None if own is None else own[1])
        return example_from_function(model, function, free_sizes=sizes)
    if seen.call is None:
        raise UsageError(
            "The network has not seen a tensor yet, so the shape of its input is not known.",
            do="Give input_shape, for example input_shape=(1, 28, 28), or example_inputs.",
        )
    return example_from_seen(model, *seen.call, free_sizes=shapes.free_sizes)


def _dense(layer: LayerInfo) -> LayerInfo:
    """The record of a layer whose mask is not kept."""
    why = "the network does not use it in evaluation"
    return replace(layer, masked=False, n_active=layer.n_weights, pattern=None, why_dense=why)


def _require_made_by(name: str, model: nn.Module, signature: Signature) -> None:
    """Raise UsageError where a name makes another network: nobody could read the run."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        made = models.create(name, signature.n_classes)
    if signature.only_input is not None:
        give_shapes(made.eval(), signature.input_shape)
    problems = differences(_tensors_of(model), _tensors_of(made))
    if problems:
        raise UsageError(
            f"{name} makes another network than the one that was trained. Of the latter: {problems}.",
            do="Name the factory that made it, with the same sizes, as one that takes no arguments: for "
            "example a function `def wide(): return Net(width=64)`.",
        )


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}


def _require_masked(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Raise UsageError where an inactive weight is not 0: what was scored would not be written."""
    for name, mask in masks.items():
        n_wrong = int(torch.count_nonzero(model.get_parameter(name).detach()[~mask]))
        if n_wrong:
            raise UsageError(
                f"{n_wrong} inactive weights of {name} are not 0: the network is not the one that its masks "
                "describe, and its score is that of another network.",
                do="Train with `trainer.step()` in place of `optimizer.step()`, or `attach()`. "
                "Mask an average by `mask_also(average)` before its weights are loaded, and others by "
                "`trainer.apply_masks()`; then measure again.",
            )
