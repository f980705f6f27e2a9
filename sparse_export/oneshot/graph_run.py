"""Runs that hold a graph: a dense one of an ONNX file, and the sparse one that is made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx

from sparse_export.errors import UsageError
from sparse_export.files import staged_folder, write_json
from sparse_export.formats.listed import file_infos
from sparse_export.formats.run import (
    AGREEMENT,
    GRAPH_FILE,
    DataInfo,
    DenseInfo,
    LayerInfo,
    ModelInfo,
    Run,
    TaskInfo,
)
from sparse_export.formats.score import Score
from sparse_export.graph.layers import count_parameters, graph_layers
from sparse_export.graph.model import open_model, save_model
from sparse_export.signature import Signature
from sparse_export.train.methods.dense import DENSE
from sparse_export.train.record import new_run_info
from sparse_export.train.run_folder import write_run_info

__all__ = [
    "dense_folder",
    "dense_folder_taken",
    "facts_of_graph",
    "graph_of_run",
    "is_dense_run_of",
    "write_graph_run",
]


def dense_folder(out: Path) -> Path:
    """Where the dense network is left that the run in `out` is made of."""
    return out.absolute().with_name(f"{out.absolute().name}-dense")


def dense_folder_taken(folder: Path, what: str) -> UsageError:
    """The error of a folder that the dense network has no place in.

    Args:
        folder: of the dense network.
        what: it holds.
    """
    return UsageError(
        f"{folder} is where the dense network is left, and it holds {what}.",
        do="Move that away: `build` leaves the dense network in runs/NAME-dense, `sparsify` beside its --out.",
    )


def facts_of_graph(model: onnx.ModelProto) -> tuple[LayerInfo, ...]:
    """The record of each weight of a graph, with the 2:4 pattern where its zeros already have it."""
    found: dict[str, LayerInfo] = {}
    for layer in graph_layers(model):
        if not layer.constant or not layer.shape or layer.weight in found:
            continue
        has_zeros = layer.n_nonzero <= layer.n_weights // 2 and bool(layer.pattern_holds)
        found[layer.weight] = LayerInfo(
            name=layer.weight,
            shape=layer.shape,
            n_weights=layer.n_weights,
            n_active=layer.n_nonzero if has_zeros else layer.n_weights,
            masked=has_zeros,
            pattern="2:4" if has_zeros else None,
        )
    return tuple(found.values())


def write_graph_run(
    out: Path,
    model: onnx.ModelProto,
    signature: Signature,
    layers: Sequence[LayerInfo],
    *,
    name: str,
    method: str = DENSE.name,
    seed: int = 0,
    n_threads: int = 1,
    seconds: float = 0.0,
    test: Score | None = None,
    dense: DenseInfo | None = None,
    task: str | None = None,
    data: DataInfo | None = None,
    report: object = None,
    report_file: str = "",
) -> Run:
    """Write a graph as a finished run, whole or not at all.

    Args:
        out: a new or empty folder.
        model: the graph.
        signature: of it.
        layers: the record of each weight.
        name: of the network.
        method: by which it was made sparse.
        seed: of what was drawn.
        n_threads: that worked on it.
        seconds: that this took.
        test: score on a test set, if any.
        dense: the network that it was made from.
        task: what it is for; None for one whose outputs are held against the dense network's.
        data: what it was scored on.
        report: what is written to `report_file`, ready for JSON; None for nothing.
        report_file: its name.

    Raises:
        OutputError: it cannot be written.
    """
    info = new_run_info(
        n_parameters=count_parameters(model)[0],
        method=method,
        model=ModelInfo(name=name, form="onnx"),
        signature=signature,
        data=data,
        layers=tuple(layers),
        seed=seed,
        n_threads=n_threads,
        device="cpu",
        test=test,
        seconds=seconds,
        task=AGREEMENT if task is None else TaskInfo(name=task),
        dense=dense,
    )
    with staged_folder(out) as stage:
        files = save_model(model, stage / GRAPH_FILE)
        info = replace(info, status="complete", files=file_infos(stage, files))
        write_run_info(stage, info)
        if report is not None:
            write_json(stage / report_file, report)
    return Run(path=out, info=info)


def graph_of_run(run: Run) -> onnx.ModelProto:
    """The graph of a run that holds one, each of its files checked by hash.

    Raises:
        ArtefactError: a file is not the one that was written.
    """
    return open_model(run.graph_path)


def is_dense_run_of(run: Run, source_sha256: str) -> bool:
    """Is a run the dense one of this very source?

    Args:
        run: a finished run.
        source_sha256: of the file, or of the graph, that it was made from.
    """
    info = run.info
    known = None if info.dense is None else info.dense.sha256
    graph = info.files[GRAPH_FILE].sha256 if GRAPH_FILE in info.files else None
    return info.method == DENSE.name and source_sha256 in (known, graph)
