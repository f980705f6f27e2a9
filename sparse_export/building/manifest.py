"""The manifest of a bundle and its table of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from sparse_export.building.dense_baseline import TimedEngines
from sparse_export.building.engine_form import EngineForm
from sparse_export.building.engines import Engines
from sparse_export.building.golden import ATOL
from sparse_export.building.graph import BuiltGraph
from sparse_export.engines.options import Precision
from sparse_export.engines.precision import RMS_TOLERANCE, TOLERANCE
from sparse_export.files import sha256_file
from sparse_export.formats.bundle import (
    ENGINE_MODEL_FILE,
    BundleInfo,
    EngineGraphInfo,
    GoldenInfo,
    PatternInfo,
    RunReference,
)
from sparse_export.formats.layers import GraphLayer
from sparse_export.formats.listed import FileInfo
from sparse_export.formats.preparation import PreprocessInfo
from sparse_export.formats.run import RUN_FILE, Run
from sparse_export.graph.nodes import ONNX_DOMAINS
from sparse_export.version import command_line, library_versions, now

__all__ = ["bundle_info", "layers_document"]


def layers_document(layers: Sequence[GraphLayer], built: Engines, timed: TimedEngines) -> dict[str, object]:
    """Assemble `layers.json`.

    Args:
        layers: of the graph.
        built: the engines, with what became of each layer in them.
        timed: times of their layers, where they were measured.

    Returns:
        The document, ready for JSON.
    """
    rows = {file: [asdict(row) for row in rows] for file, rows in built.layers.items()}
    document: dict[str, object] = {"layers": [asdict(layer) for layer in layers], "engines": rows}
    if timed.times:
        document["times"] = {file: [asdict(one) for one in times] for file, times in timed.times.items()}
    return document


def bundle_info(
    run: Run,
    graph: BuiltGraph,
    *,
    golden: GoldenInfo,
    postprocess: Sequence[str] = (),
    preprocess: PreprocessInfo | None = None,
    precision: Precision,
    built: Engines,
    pattern: PatternInfo | None,
    files: Mapping[str, FileInfo],
) -> BundleInfo:
    """Assemble the manifest of a bundle.

    Args:
        run: the run that the bundle was built from.
        graph: the graph that ships.
        golden: files of the golden pair.
        postprocess: the steps that were appended to the graph.
        preprocess: the graph before it, None for none.
        precision: of that graph.
        built: the engines.
        pattern: what was done to satisfy a pattern, None where none was requested.
        files: size and hash of every other file of the bundle, by its path within it.
    """
    info = run.info
    return BundleInfo(
        method=info.method,
        model=info.model,
        data=info.data,
        run=RunReference(path=str(run.path.resolve()), run_sha256=sha256_file(run.path / RUN_FILE)),
        precision=precision,
        n_calibration=graph.n_calibration,
        targets=("onnx", *(one.target for one in built.infos)),
        opset=max(entry.version for entry in graph.model.opset_import if entry.domain in ONNX_DOMAINS),
        ir_version=graph.model.ir_version,
        signature=graph.signature,
        task=info.task,
        dense=info.dense,
        golden=golden,
        density=graph.density,
        layers=graph.promising,
        n_parameters=graph.n_parameters,
        n_nonzero=graph.n_nonzero,
        macs=_total([layer.macs for layer in graph.layers]),
        nonzero_macs=_total([layer.nonzero_macs for layer in graph.layers]),
        score=info.test,
        atol=ATOL,
        rtol=TOLERANCE[precision],
        rms=RMS_TOLERANCE[precision],
        versions=library_versions(),
        command=command_line(),
        created=now(),
        files=dict(files),
        compacted=graph.compacted,
        fitted=pattern,
        postprocess=tuple(postprocess),
        preprocess=preprocess,
        folded=graph.folded,
        engine_graph=_engine_graph(graph.engine),
        engines=built.infos,
    )


def _engine_graph(form: EngineForm | None) -> EngineGraphInfo | None:
    """The record of the graph that engines are built of, where that is another one."""
    if form is None:
        return None
    return EngineGraphInfo(
        file=ENGINE_MODEL_FILE,
        ranges=form.ranges,
        migrated=form.migrated,
        rms=dict(form.rms),
        n_products=form.n_products,
        n_quantized=form.n_quantized,
    )


def _total(counts: Sequence[int | None]) -> int | None:
    """The sum, None where one of them is unknown."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None
