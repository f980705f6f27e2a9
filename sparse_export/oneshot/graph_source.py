"""A network as a graph with its signature: of an ONNX file, or of a torch network that is exported."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from sparse_export.errors import UsageError
from sparse_export.files import sha256_file
from sparse_export.graph.model import axes_from_text, open_model, signature_of, sizes_from_text, with_axes
from sparse_export.runtimes.probe import require_runnable
from sparse_export.signature import Signature
from sparse_export.tasks.inputs import example_sizes

__all__ = ["GraphSource", "Told", "is_graph_file", "source_of_file"]


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a user tells of a network's inputs.

    Attributes:
        axes: texts like `state=_,batch,_`, as `--axes` is given.
        sizes: texts like `height=640`, as `--size` is given.
        inputs: file or folder of inputs; None for none.
    """

    axes: Sequence[str] = ()
    sizes: Sequence[str] = ()
    inputs: Path | None = None


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
        raise UsageError(f"{path} does not exist.", do="Give the path of an ONNX file.")
    model = open_model(path)
    signature = with_example_sizes(model, told)
    with_axes(model, signature)
    require_runnable(path, replace(signature, outputs=signature.outputs))
    digest = sha256_file(path)
    return GraphSource(
        name=path.name,
        model=model,
        signature=signature,
        sha256=digest,
        origin={"from": "file", "path": str(path.resolve()), "sha256": digest},
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
        found = example_sizes(told.inputs, signature)
        signature = replace(signature, sizes={**found, **signature.sizes})
    missing = [name for name in signature.free if name != signature.batch and name not in signature.sizes]
    if missing:
        options = " ".join(f"--size {name}=NUMBER" for name in missing)
        raise UsageError(
            f"The sizes {', '.join(missing)} of the inputs are free: {signature}.",
            expected="An example of each was expected, to run the network with.",
            do=f"Give {options}, or real inputs by --inputs FILE.npz.",
        )
    return signature


def digest_of_graph(model: onnx.ModelProto) -> str:
    """SHA-256 of a graph in memory, its stored tensors one by one."""
    digest = hashlib.sha256()
    for tensor in model.graph.initializer:
        digest.update(tensor.SerializeToString(deterministic=True))
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.initializer[:]
    digest.update(bare.SerializeToString(deterministic=True))
    return digest.hexdigest()
