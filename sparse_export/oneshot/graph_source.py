"""A network as a graph with its signature: of an ONNX file, or of a torch network that is exported."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from sparse_export import models
from sparse_export.errors import UsageError
from sparse_export.files import sha256_file
from sparse_export.formats.preparation import RawType
from sparse_export.formats.run import GRAPH_FILE, RUN_FILE, Run
from sparse_export.graph.call_record import example_of_signature
from sparse_export.graph.example import example_of_shape
from sparse_export.graph.example_sources import example_from_arrays, example_from_function
from sparse_export.graph.export import onnx_from_module
from sparse_export.graph.free_axes import FreeSizes
from sparse_export.graph.model import (
    axes_from_text,
    open_model,
    prepared,
    signature_of,
    sizes_from_text,
    with_axes,
)
from sparse_export.graph.protobuf import serialized_tensor
from sparse_export.graph.saved import without_initializers
from sparse_export.oneshot.graph_run import graph_of_run
from sparse_export.oneshot.source import open_source, require_weights, run_of
from sparse_export.runtimes.probe import require_runnable
from sparse_export.signature import Signature
from sparse_export.tasks.data import own
from sparse_export.tasks.inputs import example_sizes, read_inputs, some_arrays, with_seen_ranges
from sparse_export.tasks.named_data import open_named

__all__ = ["GraphSource", "Told", "graph_source", "is_graph_file", "source_of_file"]


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a user tells of a network's inputs.

    Attributes:
        axes: texts like `state=_,batch,_`, as `--axes` is given.
        sizes: texts like `height=640`, as `--size` is given.
        inputs: file or folder of inputs; None for none.
        data: name of data whose first sample has the free sizes that nothing else tells; None for none.
        data_dir: where a relative file of them starts.
        raw: type of the samples in `inputs`, for a network that takes one float input which a graph is to make
            of them; None where they are the network's inputs.
    """

    axes: Sequence[str] = ()
    sizes: Sequence[str] = ()
    inputs: Path | None = None
    data: str | None = None
    data_dir: str | Path | None = None
    raw: RawType | None = None

    def of_inputs(self, signature: Signature) -> Signature:
        """The signature of the samples in `inputs`.

        Args:
            signature: of the network.
        """
        if self.raw is None or signature.only_input is None:
            return signature
        return replace(signature, inputs=(replace(signature.only_input, dtype=self.raw),))


@dataclass(frozen=True, kw_only=True)
class GraphSource:
    """A graph whose weights are the network's.

    Attributes:
        name: of the network, for people.
        model: with its data, as `open_model` opens it.
        signature: of the graph.
        sha256: of what it was made from.
        origin: where it is from, for the record.
    """

    name: str
    model: onnx.ModelProto
    signature: Signature
    sha256: str
    origin: dict[str, str]


def is_graph_file(model: str | Path) -> bool:
    """Is this the name of an ONNX file?"""
    return Path(model).suffix == ".onnx"


def source_of_file(path: Path, told: Told) -> GraphSource:
    """Open an ONNX file, in another process first, which a hostile or damaged file may end.

    Args:
        path: of the file.
        told: of its inputs.

    Raises:
        UsageError: there is no such file, or what was told does not fit it.
        ArtefactError: it is no ONNX file that onnxruntime runs.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UsageError(f"{path} {what}.", do="Give the path of an ONNX file.")
    model = open_model(path)
    signature = with_example_sizes(model, told)
    with_axes(model, signature)
    drawn = signature  # integers that stand for a choice, as a rate does, are not just any
    if told.inputs is not None:
        drawn = with_seen_ranges(signature, read_inputs(told.inputs, told.of_inputs(signature)))
    require_runnable(path, drawn)
    digest = sha256_file(path)
    return GraphSource(
        name=path.name,
        model=model,
        signature=signature,
        sha256=digest,
        origin={"from": "file", "path": str(path.resolve()), "sha256": digest},
    )


def graph_source(
    model: str,
    told: Told,
    *,
    weights: str | None,
    input_shape: Sequence[int] | None,
    seed: int,
    trust: str | None,
    in_torch: bool = False,
) -> GraphSource | None:
    """The network as a graph where it is to be pruned as one; None for one that is pruned in torch.

    A graph is what an ONNX file is, and every network with other inputs than one of floats, or other outputs
    than logits.

    Args:
        model: as `sparsify` takes it.
        told: of its inputs.
        weights: likewise.
        input_shape: of one sample, of a torch network with one input of floats.
        seed: of random weights.
        trust: digest of a run's `run.json`.
        in_torch: something was asked for that is done to torch networks alone, like training on a data set.

    Raises:
        SparseExportError: as `source_of_file` and `open_source`, or what was told does not fit.
    """
    if is_graph_file(model):
        if weights is not None or input_shape is not None:
            raise UsageError(
                f"{'--weights' if weights is not None else '--input-shape'} was given for the ONNX file "
                f"{model}.",
                do="Leave it out: the file holds its weights, and --size tells free sizes.",
            )
        return source_of_file(Path(model), told)
    run = run_of(model, any_form=True)
    if run is not None and run.info.model.form == "onnx":
        return _source_of_graph_run(run, told)
    require_weights(model, run, weights)  # before the user's module is imported
    own = None if run is not None or (in_torch and told.inputs is None) else _own_example(model)
    if told.inputs is None and own is None and (in_torch or _is_classifier(model, run, input_shape)):
        if told.axes or told.sizes:
            raise UsageError(
                f"{'--axes' if told.axes else '--size'} was given for the torch network {model}.",
                expected="An ONNX file was expected.",
                do="Tell free sizes by `free_sizes` beside the factory.",
            )
        return None
    return _source_of_torch(model, run, told, own, weights, input_shape, seed, trust)


def _source_of_graph_run(run: Run, told: Told) -> GraphSource:
    model = graph_of_run(run)
    signature = run.info.signature
    if told.axes or told.sizes:
        signature = with_example_sizes(model, told)
    digest = run.info.files[GRAPH_FILE].sha256
    origin = {"from": "run", "path": str(run.path.resolve()), "sha256": sha256_file(run.path / RUN_FILE)}
    return GraphSource(
        name=str(run.info.model.name), model=model, signature=signature, sha256=digest, origin=origin
    )


def _own_example(model: str) -> tuple[Callable[[], Any], FreeSizes | None] | None:
    """`example_inputs` and `free_sizes` beside a user's factory; None where there are none."""
    return models.example_beside(model) if models.is_factory(model) else None


def _is_classifier(model: str, run: Run | None, input_shape: Sequence[int] | None) -> bool:
    """Does a network take one input of floats and return logits? Yes where that is not known."""
    if run is not None:
        return run.info.signature.only_input is not None and run.info.signature.n_classes is not None
    if input_shape is None or not models.is_factory(model):
        return True
    try:
        with torch.no_grad():
            returned = example_of_shape(input_shape).call(models.create(model).eval())
    except UsageError:
        raise
    except Exception:  # noqa: BLE001 - whatever forward raises is told by what prunes it
        return True
    return isinstance(returned, torch.Tensor) and returned.dim() == 2


def _source_of_torch(
    model: str,
    run: Run | None,
    told: Told,
    own: tuple[Callable[[], Any], FreeSizes | None] | None,
    weights: str | None,
    input_shape: Sequence[int] | None,
    seed: int,
    trust: str | None,
) -> GraphSource:
    run_of(model)  # whose network has to be made again
    source = open_source(model, run, weights, n_classes=None, seed=seed, trust=trust)
    if not all(bool(mask.all()) for mask in source.masks.values()):
        raise UsageError(
            f"The run {model} was trained sparse"
            + (". With --inputs" if told.inputs is not None else "; without data of classes")
            + " it would be pruned as a graph, which keeps no masks.",
            do="Give --data NAME, or --data none with --method magnitude."
            if _is_classifier(model, run, None)
            else "Build it as it is, or train it with a pattern from the start.",
        )
    network = source.network
    if own is not None:
        example = example_from_function(network, own[0], free_sizes=own[1])
    elif run is not None:
        example = example_of_signature(network, run.info.signature, run.info.call)
    elif told.inputs is not None and input_shape is None:
        arrays = some_arrays(told.inputs)
        if told.raw is not None:
            arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
        example = example_from_arrays(network, arrays)
    else:
        example = example_of_shape(input_shape or models.input_shape(model) or ())
    graph = onnx_from_module(network, example, masks={}, fold=False)
    source = replace(source, network=nn.Module(), masks={})  # the graph has the weights now
    del network
    gc.collect()  # torch.export's program refers to the network in circles
    graph = prepared(graph)
    signature = signature_of(graph)
    sizes = {**example.sizes, **signature.sizes}
    signature = replace(signature, sizes={name: sizes[name] for name in sizes if name in signature.free})
    return GraphSource(
        name=source.name,
        model=graph,
        signature=signature,
        sha256=digest_of_graph(graph),
        origin=source.origin,
    )


def with_example_sizes(model: onnx.ModelProto, told: Told) -> Signature:
    """The signature of a graph, its free sizes by those of the inputs that were given, or as told.

    Raises:
        UsageError: what was told does not fit, or a free size is not known.
    """
    axes: Mapping[str, Sequence[str]] = axes_from_text(told.axes)
    sizes = sizes_from_text(told.sizes)
    signature = signature_of(model, axes=axes, sizes=sizes)
    if told.inputs is not None:
        found = example_sizes(told.inputs, told.of_inputs(signature))
        signature = replace(signature, sizes={**found, **signature.sizes})
    missing = _sizes_missing(signature)
    if missing and (own.is_own(told.data or "") or (told.data or "").startswith("npz:")):
        samples = open_named(str(told.data), signature, told.data_dir).samples
        found = signature.sizes_in(next(iter(samples.batches(1))))
        signature = replace(signature, sizes={name: found[name] for name in missing} | signature.sizes)
        missing = _sizes_missing(signature)
    if missing:
        options = " ".join(f"--size {name}=NUMBER" for name in missing)
        raise UsageError(
            f"The sizes {', '.join(missing)} of the inputs are free: {signature}.",
            expected="An example of each was expected, to run the network with.",
            do=f"Give {options}, or real inputs by --inputs FILE.npz.",
        )
    return signature


def _sizes_missing(signature: Signature) -> list[str]:
    """The free sizes, but that of the batch, of which no example is known."""
    return [name for name in signature.free if name != signature.batch and name not in signature.sizes]


def digest_of_graph(model: onnx.ModelProto) -> str:
    """SHA-256 of a graph in memory, its stored tensors one by one."""
    digest = hashlib.sha256()
    for tensor in model.graph.initializer:
        for part in serialized_tensor(tensor):
            digest.update(part)
    digest.update(without_initializers(model).SerializeToString(deterministic=True))
    return digest.hexdigest()
