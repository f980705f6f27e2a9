"""What was asked for, held against the data and the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from sparse_export import models
from sparse_export.errors import ArtefactError, UsageError
from sparse_export.formats.run import DataInfo, Run
from sparse_export.graph.example import example_of_shape
from sparse_export.graph.randomness import require_deterministic
from sparse_export.oneshot.layers import Method
from sparse_export.oneshot.source import Source
from sparse_export.sparsity.pattern import NMPattern
from sparse_export.tasks.labels import require_outputs
from sparse_export.tasks.shipped import Classification
from sparse_export.tasks.task import Task
from sparse_export.train.loader import BatchLoader
from sparse_export.train.teacher import FEATURES, OUTPUTS

__all__ = [
    "data_name",
    "input_shape_of",
    "n_outputs_of",
    "require_distillation",
    "require_numbers",
    "require_plan_for",
    "require_same_data",
    "require_usable_weights",
]

_NO_DATA = "none"


def require_plan_for(pattern: NMPattern, planned_dense: Mapping[str, str] | None) -> None:
    """Raise UsageError for a plan beside a pattern that it was not made for."""
    if planned_dense is not None and str(pattern) != "2:4":
        raise UsageError(
            f"A plan and the pattern {pattern} were given; plans are for 2:4 only.",
            do="Leave out --plan or --pattern.",
        )


def require_numbers(calibration_samples: int, finetune: int, seed: int) -> None:
    for name, value, least in (
        ("calibration_samples", calibration_samples, 1),
        ("finetune", finetune, 0),
        ("seed", seed, 0),
    ):
        if value < least:
            raise UsageError(f"{name} is {value}.", expected=f"At least {least} was expected.")


def require_distillation(distill: str | None, finetune: int) -> None:
    """Raise UsageError for what cannot be learnt of a dense network, or without fine-tuning."""
    if distill is None:
        return
    if distill not in (OUTPUTS, FEATURES):
        raise UsageError(
            f"--distill is {distill!r}.",
            expected=f"{OUTPUTS} was expected, or {FEATURES}: those of the dense network are learnt.",
        )
    if not finetune:
        raise UsageError(
            "--distill was given without --finetune.",
            do="Give --finetune EPOCHS: the dense network's outputs are learnt by training.",
        )


def require_usable_weights(source: Source) -> None:
    """Raise UsageError for weights that are not float32, and ArtefactError for such as are not finite."""
    for name, weight in source.network.named_parameters():
        if is_lazy(weight):
            continue
        if weight.dtype != torch.float32:
            raise UsageError(
                f"{name} of the model {source.name} is {str(weight.dtype).removeprefix('torch.')}.",
                expected="A network in float32 was expected; --precision of build makes another type of it.",
                do="Call .float() on the network where it is made.",
            )
        if not bool(weight.isfinite().all()):
            raise ArtefactError(
                f"{name} of the model {source.name} holds NaN or infinity.",
                expected="Finite weights were expected.",
                do="Look at the training that they come from, which may have diverged.",
            )


def data_name(
    data: str | None,
    run: Run | None,
    method: Method,
    *,
    finetune: int,
    moving: bool,
    norms: bool,
    errors: bool,
    recovers: bool = False,
) -> str | None:
    """The data to use, None for none. Raises UsageError where the other options need some."""
    if moving and not finetune:
        raise UsageError(
            "--moving was given without --finetune.",
            do="Give --finetune EPOCHS: masks move only while the network is trained.",
        )
    if data is None and run is not None and run.info.data is not None:
        data = run.info.data.name
    if data is not None and data != _NO_DATA:
        return data
    for needs, what in (
        (method != "magnitude", f"The method {method} looks at what each layer meets on real inputs"),
        (finetune > 0, "Fine-tuning trains on data"),
        (norms, "Batch norms are re-estimated on data"),
        (errors, "Errors of layers are measured on data"),
        (recovers, "Recovery holds the pruned network against the dense one on data"),
    ):
        if needs:
            raise UsageError(
                f"{what}, and there are none.",
                expected="A data set was expected.",
                do="Give --data NAME, with --data-dir for where it lies"
                + (", or choose --method magnitude." if method != "magnitude" else "."),
            )
    return None


def require_same_data(run: Run, found: DataInfo) -> None:
    wanted = run.info.data
    if wanted is not None and found.name == wanted.name and found.test_sha256 != wanted.test_sha256:
        raise ArtefactError(
            f"The data differ from those that the run in {run.path} was trained on: the test set of {found.name} "
            f"has {found.n_test:,} samples with SHA-256 {found.test_sha256[:12]}, that of the run "
            f"{wanted.n_test:,} with {wanted.test_sha256[:12]}.",
            do="Give the folder with the original data by --data-dir.",
        )


def input_shape_of(
    source: Source, run: Run | None, loader: BatchLoader | None, given: Sequence[int] | None
) -> tuple[int, ...]:
    told = tuple(given) if given is not None else None
    if loader is not None:
        if not isinstance(loader.sample(1), Tensor):
            raise UsageError(
                f"The samples of {loader.info.name} have named inputs.",
                expected="One input of floats was expected.",
                do="Leave out --data and what needs it, so that the network is pruned as a graph; or train it "
                "sparse by a recipe.",
            )
        if told is not None and told != loader.input_shape:
            raise UsageError(
                f"An input shape of {told} was given, and the samples of {loader.info.name} are "
                f"{loader.input_shape}.",
                expected="One shape was expected.",
                do="Leave out --input-shape.",
            )
        return loader.input_shape
    if run is not None:
        told = told or run.info.signature.input_shape
    shape = told or models.input_shape(source.name)
    if shape is None:
        raise UsageError(
            f"The shape of the inputs of {source.name} is not known.",
            expected="Data, or the shape of one sample, was expected.",
            do="Give --data NAME, --input-shape like 3,224,224, or real inputs by --inputs FILE.npz; or write "
            "example_inputs() beside the factory.",
        )
    return shape


@torch.no_grad()
def n_outputs_of(source: Source, shape: tuple[int, ...], n_classes: int | None, task: Task) -> int | None:
    """The number of logits; of another task than classification that of numbers a sample, if there is one.

    Raises UsageError when the network does not take such inputs, gives too few, or is random in evaluation.
    """
    try:
        output = source.network(torch.zeros((2, *shape)))
    except Exception as cause:  # whatever a network raises: some assert, some index
        reason = next(iter(str(cause).splitlines()), type(cause).__name__)
        raise UsageError(
            f"The model {source.name} cannot take inputs of shape {shape}: {reason}.",
            expected="A model and inputs of one shape were expected.",
            do="Choose other data, or give the right --input-shape; of other inputs than one of floats, write "
            "example_inputs() beside the factory, or give --inputs FILE.npz.",
        ) from cause
    if not isinstance(task, Classification):
        require_deterministic(source.network, example_of_shape(shape))
        return output.shape[1] if isinstance(output, Tensor) and output.ndim == 2 else None
    if n_classes is not None and isinstance(output, Tensor) and output.ndim == 2:
        require_outputs(
            output.shape[1],
            f"The model {source.name}",
            do="Give --data none, with --method magnitude, and compute the score of its task outside.",
        )
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] < (n_classes or 1):
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UsageError(
            f"The model {source.name} returns {got} for two inputs.",
            expected=f"Logits of shape (2, {n_classes or 'classes'}) were expected.",
            do="Choose a model with as many outputs as there are classes; or leave out --data and what needs "
            "it, so that the model is pruned as a graph, by example_inputs() beside its factory or --inputs "
            "FILE.npz.",
        )
    require_deterministic(source.network, example_of_shape(shape))
    return int(output.shape[1])
