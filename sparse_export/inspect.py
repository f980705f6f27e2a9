"""Tells what a run, a bundle or an ONNX file holds, layer by layer, and whether its zeros can be used."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_export.engines.foreign_log import layers_from_file, log_from_file
from sparse_export.engines.header import read_header
from sparse_export.errors import ArtefactError, UsageError
from sparse_export.files import put_back, sha256_file
from sparse_export.formats.bundle import (
    BUNDLE_FILE,
    CACHE_FOLDER,
    SUMS_FILE,
    Bundle,
    BundleInfo,
    read_bundle_info,
)
from sparse_export.formats.engines import EngineInfo
from sparse_export.formats.layers import LAYERS_FILE, read_engine_layers, read_engine_times
from sparse_export.formats.listed import FileInfo, file_of, require_complete, verify_files
from sparse_export.formats.run import RUN_FILE, LayerInfo, RunInfo, read_run_info
from sparse_export.formats.score import Score
from sparse_export.graph.if_pruned import LayerIfPruned, totals_if_pruned
from sparse_export.inspection import ForeignEngine, InspectedEngine, InspectedLayer, Inspection

if TYPE_CHECKING:
    from onnx import ModelProto

    from sparse_export.graph.quantized_ends import QuantizedEnds

__all__ = ["inspect"]

_ENGINE_SUFFIXES = (".engine", ".plan", ".trt")


def inspect(
    path: str | Path, *, trt_log: str | Path | None = None, trt_layers: str | Path | None = None
) -> Inspection:
    """Look at a run folder (finished or not), a bundle, or an ONNX file or an engine of anybody's making.

    An engine is not loaded, for that would run its code: what its bundle and its first bytes tell is shown.
    Files that are not what was written are in the result.

    Args:
        path: of the folder or file.
        trt_log: of the build of an engine elsewhere, from the graph at `path`.
        trt_layers: JSON of that engine's layers.

    Raises:
        UsageError: a path that is none of these, or another file of a run or a bundle; a log or JSON that is
            not there, or without a graph.
        ArtefactError: a description or a graph that cannot be read; a log or JSON of something else.
    """
    found = _inspected(Path(path))
    if trt_log is None and trt_layers is None:
        return found
    return replace(found, foreign=_foreign_engine(found, trt_log, trt_layers))


def _foreign_engine(
    found: Inspection, trt_log: str | Path | None, trt_layers: str | Path | None
) -> ForeignEngine:
    """What an engine that was built elsewhere made of a graph."""
    import onnx

    from sparse_export.engines.explain import explain, nodes_with_float_output

    if found.kind not in ("onnx", "bundle"):
        raise UsageError(
            f"{found.path} holds no ONNX graph, which --trt-log and --trt-layers explain layer by layer.",
            do="Give the .onnx file that the engine was built from, or a bundle.",
        )
    log = log_from_file(trt_log) if trt_log is not None else None
    layers = layers_from_file(trt_layers) if trt_layers is not None else ()
    float_output: frozenset[str] = frozenset()
    if any(reason.code == "int8" for layer in found.graph for reason in layer.reasons):
        path = Path(found.path)
        file = Bundle(path=path, info=read_bundle_info(path)).onnx_path if found.kind == "bundle" else path
        float_output = nodes_with_float_output(onnx.load(file, format="protobuf", load_external_data=False))
    explained = explain(found.graph, log=log, engine=layers, float_output=float_output)
    sources = tuple(str(one) for one in (trt_log, trt_layers) if one is not None)
    return ForeignEngine(sources=sources, layers=explained.layers, notes=explained.notes)


def _inspected(path: Path) -> Inspection:
    put_back(path)
    if path.is_dir() and (path / RUN_FILE).is_file():
        return _of_run(path)
    if path.is_dir() and (path / BUNDLE_FILE).is_file():
        return _of_bundle(path)
    if path.is_file():
        if path.suffix in _ENGINE_SUFFIXES:
            return _of_engine(path)
        _require_no_part(path)
        return _of_onnx(path)
    what = f"{path} is neither a run nor a bundle" if path.exists() else f"{path} does not exist"
    raise UsageError(
        f"{what}.",
        expected=(
            f"A run folder (with {RUN_FILE}), a bundle (with {BUNDLE_FILE}), an .onnx file or an "
            ".engine was expected."
        ),
        do="Correct the path.",
    )


def _require_no_part(path: Path) -> None:
    """Raise UsageError for a file of a run or a bundle that is no graph: only the folder tells what it is."""
    if path.suffix == ".onnx":
        return
    for folder in path.absolute().parents[:2]:
        for file, kind in ((RUN_FILE, "run"), (BUNDLE_FILE, "bundle")):
            if (folder / file).is_file():
                raise UsageError(
                    f"{path} is a file in the {kind} {folder}.",
                    expected=f"The folder of a {kind}, an .onnx file or an .engine was expected.",
                    do=f"Give the folder: sparse-export inspect {shlex.quote(str(folder))}",
                )


def _of_run(path: Path) -> Inspection:
    info = read_run_info(path)
    facts = {
        "method": info.method,
        "model": info.model.name or "in memory only",
        "data": info.data.name if info.data else "none",
        "epochs": str(info.epochs),
        "made": info.created,
    }
    kind = "run" if info.status == "complete" else "unfinished run"
    layers = _kept(info.layers)
    found = _inspection(path, kind, layers, info.n_parameters, info.test, facts, info.files, info)
    return replace(found, speed=info.speed)


def _of_bundle(path: Path) -> Inspection:
    info = read_bundle_info(path)
    facts = {
        "method": info.method,
        "model": info.model.name or "in memory only",
        "data": info.data.name if info.data else "none",
        "built for": ", ".join(info.targets),
        "precision": info.precision,
        "made": info.created,
    }
    if info.folded is not None:
        facts["takes"] = info.folded.words
    if info.macs is not None and info.nonzero_macs is not None:
        facts["multiply-accumulates"] = (
            f"{info.macs:,} for one sample, {info.nonzero_macs:,} by non-zero weights"
        )
    bundle = Bundle(path=path, info=info)
    graph, broken, unchecked, names = _graph_of_bundle(bundle)
    if names:
        facts["NaN or infinity"] = names
    if info.compacted is not None:
        facts["compacted"] = (
            f"{info.compacted.n_weights_after:,} of {info.compacted.n_weights_before:,} parameters left"
        )
    layers = _kept(info.layers)
    found = _inspection(path, "bundle", layers, info.n_parameters, info.score, facts, info.files, info)
    engines = tuple(_inspected_engine(bundle, fact) for fact in info.engines)
    return replace(
        found,
        graph=graph,
        engines=engines,
        broken=broken,
        unchecked=unchecked,
        problem=found.problem or _problem_with_graph(bundle),
        unlisted=_unlisted(path, info),
        if_pruned=totals_if_pruned(graph) if graph else None,
        quantized=_quantized_in_bundle(bundle),
    )


def _quantized_in_bundle(bundle: Bundle) -> tuple[QuantizedEnds, ...]:
    """Of the graph that engines are built of; nothing where it cannot be read, which `problem` reports."""
    import onnx

    own = bundle.info.engine_graph
    if own is None:
        return ()
    try:
        model = onnx.load(bundle.graph_file(own.file), format="protobuf", load_external_data=False)
    except ArtefactError:
        return ()
    return _quantized(model)


def _quantized(model: ModelProto) -> tuple[QuantizedEnds, ...]:
    """What the products of a graph read and write; nothing where no value is quantized."""
    from sparse_export.graph.quantized_ends import quantized_ends

    if not any(node.op_type == "DequantizeLinear" for node in model.graph.node):
        return ()
    return quantized_ends(model)


def _problem_with_graph(bundle: Bundle) -> str | None:
    """Why the graph, with all the files that it refers to, is not used."""
    try:
        _ = bundle.onnx_path
    except ArtefactError as cause:
        return cause.what
    return None


def _unlisted(path: Path, info: BundleInfo) -> tuple[str, ...]:
    """Files in the folder of a bundle that its manifest does not list, what running it left there apart."""
    own = {BUNDLE_FILE, SUMS_FILE, *info.files}
    found = []
    for folder, _, files in os.walk(path):
        below = Path(folder).relative_to(path)
        if not below.is_relative_to(CACHE_FOLDER):
            found += [(below / name).as_posix() for name in files]
    return tuple(sorted(os.fsencode(name).decode(errors="backslashreplace") for name in set(found) - own))


def _inspected_engine(bundle: Bundle, fact: EngineInfo) -> InspectedEngine:
    """With no layers where the table is not the one that was written, which `problem` reports."""
    try:
        file = file_of(bundle, LAYERS_FILE)
    except ArtefactError:
        return InspectedEngine(fact=fact, layers=())
    return InspectedEngine(
        fact=fact, layers=read_engine_layers(file, fact.file), times=read_engine_times(file, fact.file)
    )


def _of_engine(path: Path) -> Inspection:
    header = read_header(path)
    if header.size_bytes == 0:
        raise ArtefactError(f"{path} is empty.", expected="An engine was expected.", do="Build it again.")
    problem = None
    if header.stated_bytes not in (None, header.size_bytes):
        problem = f"it has {header.size_bytes} bytes and its header tells of {header.stated_bytes}"
    known = "unknown, to this release; it was not loaded, for that would run its code"
    facts = {
        "size": f"{header.size_bytes:,} bytes",
        "SHA-256": sha256_file(path),
        "header": f"{header.target} {header.version}" if header.target else known,
    }
    bundle = path.absolute().parent.parent
    found = None
    if (bundle / BUNDLE_FILE).is_file():
        info = read_bundle_info(bundle)
        name = path.absolute().relative_to(bundle).as_posix()
        found = next((fact for fact in info.engines if fact.file == name), None)
        facts["bundle"] = str(bundle) if found else f"{bundle}, which does not list it"
    if found is None:
        return replace(_inspection(path, "engine", (), 0, None, facts, {}), problem=problem)
    opened = Bundle(path=bundle, info=info)
    try:
        file_of(opened, found.file)
    except ArtefactError as cause:
        problem = cause.what
    listed = found.file in info.files
    return replace(
        _inspection(path, "engine", (), 0, None, facts, {}),
        n_files=int(listed),
        problem=problem,
        engines=(_inspected_engine(opened, found),),
    )


def _graph_of_bundle(
    bundle: Bundle,
) -> tuple[tuple[LayerIfPruned, ...], tuple[str, ...], str | None, str]:
    """The layers, the promises that they break, why these could not be looked at, and weights that are not
    finite.
    """
    from sparse_export.graph.overview import overview_of

    layers = bundle.info.layers
    try:
        found = overview_of(bundle.onnx_path, links=False, promising=layers)
    except (ArtefactError, UsageError) as cause:  # which file is wrong is told with the others
        return (), (), cause.what if any(layer.pattern for layer in layers) else None, ""
    return found.layers, found.broken, None, found.not_finite


def _kept(layers: tuple[LayerInfo, ...]) -> tuple[InspectedLayer, ...]:
    return tuple(
        InspectedLayer(
            name=layer.name,
            shape=layer.shape,
            n_weights=layer.n_weights,
            n_nonzero=layer.n_active,
            pattern=layer.pattern,
        )
        for layer in layers
    )


def _of_onnx(path: Path) -> Inspection:
    from sparse_export.graph.overview import overview_of

    overview = overview_of(path)
    model, found = overview.model, overview.layers
    layers = {
        layer.weight: InspectedLayer(
            name=layer.weight, shape=layer.shape, n_weights=layer.n_weights, n_nonzero=layer.n_nonzero
        )
        for layer in found
        if layer.shape
    }
    opsets = ", ".join(f"{entry.domain or 'ai.onnx'} {entry.version}" for entry in model.opset_import)
    producer = f"{model.producer_name} {model.producer_version}".strip()
    facts = {"producer": producer or "not told", "opset": opsets, "IR version": str(model.ir_version)}
    macs = [(layer.macs, layer.nonzero_macs) for layer in found]
    known = [(one, other) for one, other in macs if one is not None and other is not None]
    if found and len(known) == len(macs):
        total, nonzero = (sum(column) for column in zip(*known, strict=True))
        facts["multiply-accumulates"] = f"{total:,} for one sample, {nonzero:,} by non-zero weights"
    if overview.not_finite:
        facts["NaN or infinity"] = overview.not_finite
    n_parameters = overview.n_parameters
    inspection = _inspection(path, "onnx", tuple(layers.values()), n_parameters, None, facts, {})
    return replace(inspection, graph=found, if_pruned=totals_if_pruned(found), quantized=_quantized(model))


def _inspection(
    path: Path,
    kind: str,
    layers: tuple[InspectedLayer, ...],
    n_parameters: int,
    score: Score | None,
    facts: dict[str, str],
    files: dict[str, FileInfo],
    described: RunInfo | BundleInfo | None = None,
) -> Inspection:
    """What all kinds have in common; files of a folder are checked.

    described: what the folder's description says, which then has to list what makes it whole.
    """
    problem = None
    try:
        if described is not None:
            require_complete(path, described)
        verify_files(path, files)
    except ArtefactError as cause:
        problem = cause.what
    n_weights = sum(layer.n_weights for layer in layers)
    n_nonzero = sum(layer.n_nonzero for layer in layers)
    return Inspection(
        path=str(path),
        kind=kind,
        layers=layers,
        n_parameters=n_parameters,
        n_weights=n_weights,
        n_nonzero=n_nonzero,
        density=n_nonzero / n_weights if n_weights else 1.0,
        score=score,
        n_files=len(files),
        problem=problem,
        facts=facts,
    )
