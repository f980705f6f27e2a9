"""Writes the bundle of a run, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from onnx import ModelProto

from sparse_export.building.dense_baseline import TimedEngines, time_engines
from sparse_export.building.engine_form import EngineForm
from sparse_export.building.engines import EngineProgress, Engines, add_engines
from sparse_export.building.fold_preprocess import by_channel, raw_input_of
from sparse_export.building.golden import require_parity, write_golden
from sparse_export.building.graph import BuiltGraph, build_graph
from sparse_export.building.manifest import bundle_info, layers_document
from sparse_export.building.model_files import MODEL_FILE, model_files
from sparse_export.building.patterns import ORDERS_FILE, measure_scores
from sparse_export.building.postprocess import golden_with_postprocess
from sparse_export.building.preprocess import write_preprocess
from sparse_export.building.replaceable import require_replaceable
from sparse_export.building.request import BuildRequest, CheckedRequest, check_request
from sparse_export.engines.dry_run import DryRun, describe_build
from sparse_export.engines.options import EngineOptions, Precision
from sparse_export.engines.precision import RMS_TOLERANCE, TOLERANCE
from sparse_export.errors import SparseExportError, UsageError
from sparse_export.files import claimed, require_writable, sha256_file, staged_folder, write_json
from sparse_export.formats.bundle import (
    BUNDLE_FILE,
    ENGINE_MODEL_FILE,
    Bundle,
    GoldenInfo,
    PatternInfo,
    read_bundle_info,
    save_bundle_info,
)
from sparse_export.formats.layers import LAYERS_FILE
from sparse_export.formats.listed import file_infos
from sparse_export.formats.preparation import RawType
from sparse_export.formats.run import Run, RunInfo
from sparse_export.graph.layers import graph_layers
from sparse_export.graph.passes.fit_pattern import Gather
from sparse_export.graph.passes.postprocess import with_postprocess
from sparse_export.graph.saved import save_model
from sparse_export.graph.shapes import without_weights
from sparse_export.sparsity.pattern import NMPattern
from sparse_export.trust import remember

__all__ = ["build", "build_from_request", "dry_run"]


def build(
    run: Run | str | Path,
    out: str | Path | None = None,
    *,
    targets: Sequence[str] = ("onnx",),
    compact: bool = False,
    onnx: str = "dense",
    pattern: str | NMPattern | None = None,
    max_cut: float = 0.0,
    gather: Gather = "input",
    planned_dense: Mapping[str, str] | None = None,
    precision: Precision = "fp32",
    n_calibration: int = 256,
    data_dir: str | Path | None = None,
    engines: Sequence[EngineOptions] = (),
    time_layers: bool = False,
    inputs: str | Path | None = None,
    labels: str | Path | None = None,
    postprocess: Sequence[str] = (),
    preprocess: bool = False,
    fold: RawType | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    progress: EngineProgress | None = None,
    trust: str | None = None,
) -> Bundle:
    """Write the bundle of a finished run, whole or not at all.

    onnxruntime runs the ONNX file just written on the golden input, in batches of 1, 2, 3 and 8, before
    anything takes its name. The digest of the manifest is remembered as this user's own.

    Args:
        run: a run or its folder; its files are checked by hash, and the network in memory is used where there
            is one.
        out: the bundle's folder, `<run>-bundle` beside the run by default. A bundle there is replaced, unless
            it holds files that its manifest does not list; links are followed.
        targets: what to build for: `onnx`, `tensorrt`, `tensorrt-rtx`. The ONNX file is always written.
        compact: remove dead channels from the graph; its outputs are compared with those of the whole graph
            first.
        onnx: `dense`; `packed` for packed 2:4 weights; `both` adds the dense form as `model-dense.onnx`.
        pattern: an N:M pattern. Channels are permuted so that layers satisfy it, and those that do promise
            it. The score is then measured before and after, where the test set lies in data_dir.
        max_cut: share of sum |w|, from 0 to below 1, that a layer may lose to satisfy the pattern.
        gather: which layers may get their input in an order of their own: those that read the network's
            `input`, `any` or `none`.
        planned_dense: the weights that a layer plan leaves dense, each with its reason
            (`sparse_export.plan.planning.dense_by_plan`); the plan then decides about small layers too.
        precision: of the graph, and so of the engines; inputs and outputs are float32 in any.
        n_calibration: number of training samples that int8 and fp8 take their ranges from.
        data_dir: where the data sets lie.
        engines: options of a target, where not the defaults; at most one for each target.
        time_layers: build each engine once more without sparse kernels and time the layers of both; needs a
            GPU.
        inputs: file or folder of real inputs, as `sparsify` takes them, for the golden pair and for int8 and
            fp8; None for random ones, and for training samples.
        labels: file with the names of the classes, one a line; None for those that the run has.
        postprocess: what is appended to the graph behind the network: `softmax` or `sigmoid`, `argmax`,
            `topk:K`. The scores stay the first output.
        preprocess: write `preprocess.onnx` too, which makes the network's input of raw samples as training
            did.
        fold: type of raw samples that the graph takes in place of the network's input: their scaling and
            normalization is folded into it. Samples of `inputs` have this type then.
        mean: of each channel of pictures in 0 to 1, for `fold` where the run names no data set.
        std: likewise.
        progress: called with the target and how far its build is.
        trust: SHA-256 of the run's `run.json`, needed once for a run that names a factory and was made
            elsewhere.

    Returns:
        The bundle.

    Raises:
        UsageError: an invalid request, or a folder that may not be replaced.
        FolderInUse: another process writes to that folder.
        ArtefactError: the run is damaged or unfinished.
        NotTrustedError: the run names a factory that this user does not vouch for.
        OutputError: the bundle cannot be written.
        GateFailed: the graph or its output differs from the network's, or no weight is 2:4 that could be
            packed.
        MissingCapability: a target cannot be built here; raised last, and the bundle has the other targets.
        EngineBuildFailed: the library built no engine; raised last, likewise.
    """
    request = BuildRequest(
        targets=targets,
        compact=compact,
        onnx=onnx,
        pattern=pattern,
        max_cut=max_cut,
        gather=gather,
        planned_dense=planned_dense,
        precision=precision,
        n_calibration=n_calibration,
        engines=engines,
        time_layers=time_layers,
        inputs=None if inputs is None else Path(inputs),
        labels=None if labels is None else Path(labels),
        postprocess=postprocess,
        preprocess=preprocess,
        fold=fold,
        mean=by_channel("mean", mean),
        std=by_channel("std", std),
    )
    return build_from_request(run, out, request, data_dir=data_dir, progress=progress, trust=trust)


def build_from_request(
    run: Run | str | Path,
    out: str | Path | None,
    request: BuildRequest,
    *,
    data_dir: str | Path | None = None,
    progress: EngineProgress | None = None,
    trust: str | None = None,
) -> Bundle:
    """Write the bundle of a finished run, as `build` does, with its options in one value.

    Args:
        run: as for `build`, as are `out`, `data_dir`, `progress` and `trust`.
        request: what to build.

    Returns:
        The bundle.

    Raises:
        SparseExportError: as `build`.
    """
    if not isinstance(run, Run | str | os.PathLike):
        raise UsageError(
            f"{type(run).__name__} is no run and no folder of one.",
            do="In a loop of your own write one by `trainer.run(FOLDER)`, and give what that returns.",
        )
    folder, module = (Path(run.path), run.module) if isinstance(run, Run) else (Path(run), None)
    checked = check_request(folder, out, request)
    require_writable(checked.target.absolute().parent)
    with claimed(checked.target):
        require_replaceable(checked.target)  # now that nobody else writes there
        opened_run = Run(path=folder, info=checked.info, module=module)
        graph = build_graph(opened_run, request, checked.wanted, data_dir=data_dir, trust=trust)
        if request.postprocess:
            model, signature = with_postprocess(graph.model, graph.signature, request.postprocess)
            graph = replace(graph, model=model, signature=signature, engine=_extended(graph, request))
        models = model_files(graph.model, request.onnx)
        with staged_folder(checked.target) as stage:
            names = _write_models(stage, models, graph)
            files = tuple(models)
            if not checked.engines:  # nobody needs the weights any more
                graph, models = replace(graph, model=without_weights(graph.model)), {}
            golden = _check_models(stage, files, graph, request)
            built, timed = _add_engines(stage, graph, checked, request, progress)
            write_json(stage / LAYERS_FILE, layers_document(graph.layers, built, timed))
            names += [LAYERS_FILE, *golden.files, *built.files, *timed.files]
            preprocess = write_preprocess(stage, checked.info, data_dir) if request.preprocess else None
            if preprocess is not None:
                names += preprocess.files
            pattern = _write_orders(stage, graph, request, checked.info, data_dir)
            if pattern is not None:
                names.append(ORDERS_FILE)
            info = bundle_info(
                opened_run,
                graph,
                golden=golden,
                postprocess=request.postprocess,
                preprocess=preprocess,
                precision=request.precision,
                built=built,
                pattern=pattern,
                files=file_infos(stage, names),
            )
            save_bundle_info(stage, info)
            info = read_bundle_info(stage)  # with its digest
            remember(sha256_file(stage / BUNDLE_FILE))
            require_replaceable(checked.target)  # a build is long: files may have been put there meanwhile
    _require_all_built({**built.failures, **timed.failures}, checked.out)
    return Bundle(path=checked.out, info=info)


def dry_run(run: str | Path, out: str | Path | None, request: BuildRequest) -> DryRun:
    """Describe what `build_from_request` would write; only the versions of the libraries are looked up.

    Args:
        run: folder of a finished run.
        out: folder of the bundle, `<run>-bundle` by default.
        request: what to build.

    Raises:
        SparseExportError: whatever `build` raises before it reads weights or data.
    """
    checked = check_request(Path(run), out, request)
    return describe_build(
        Path(run),
        checked.info,
        checked.out,
        engines=checked.engines,
        form=request.onnx,
        precision=request.precision,
        time_layers=request.time_layers,
        postprocess=request.postprocess,
        preprocess=request.preprocess,
        fold=request.fold,
    )


def _write_models(stage: Path, models: Mapping[str, ModelProto], graph: BuiltGraph) -> list[str]:
    """Write the model files. Returns their names, with those of the weights of large ones."""
    engine = {} if graph.engine is None else {ENGINE_MODEL_FILE: graph.for_engines}
    return [name for file, model in {**models, **engine}.items() for name in save_model(model, stage / file)]


def _check_models(stage: Path, files: Sequence[str], graph: BuiltGraph, request: BuildRequest) -> GoldenInfo:
    """Write the golden pair, and check each of the model files against it."""
    golden, signature, rtol = graph.golden, graph.signature, TOLERANCE[request.precision]
    rms = RMS_TOLERANCE[request.precision]
    for name in files:
        require_parity(stage / name, signature, graph.golden, rtol, rms)
        if request.postprocess:
            golden = golden_with_postprocess(stage / name, signature, graph.golden, request.postprocess, rtol)
    if graph.engine is not None:
        require_parity(stage / ENGINE_MODEL_FILE, signature, graph.golden, rtol, rms)
    return write_golden(stage, golden)


def _extended(graph: BuiltGraph, request: BuildRequest) -> EngineForm | None:
    """The graph for engines with what is appended to the other one."""
    if graph.engine is None:
        return None
    model, _ = with_postprocess(graph.engine.model, graph.signature, request.postprocess)
    return replace(graph.engine, model=model)


def _add_engines(
    stage: Path,
    graph: BuiltGraph,
    checked: CheckedRequest,
    request: BuildRequest,
    progress: EngineProgress | None,
) -> tuple[Engines, TimedEngines]:
    """Build the engines, and time their layers if that was requested."""
    built = add_engines(
        stage,
        graph.for_engines,
        graph.signature,
        graph.layers if graph.engine is None else graph_layers(graph.for_engines),
        checked.engines,
        precision=request.precision,
        previous=checked.target,
        progress=progress,
    )
    if not request.time_layers:
        return built, TimedEngines(times={}, files=(), failures={})
    timed = time_engines(
        stage,
        graph.for_engines,
        graph.signature,
        checked.engines,
        built,
        beside=checked.target,
        progress=progress,
    )
    return built, timed


def _write_orders(
    stage: Path, graph: BuiltGraph, request: BuildRequest, info: RunInfo, data_dir: str | Path | None
) -> PatternInfo | None:
    """Record what was permuted and dropped for a pattern, with both accuracies; None without one."""
    if graph.fit is None:
        return None
    write_json(stage / ORDERS_FILE, graph.fit.fitted.document)
    return PatternInfo(
        pattern=str(graph.fit.pattern),
        max_cut=request.max_cut,
        gather=request.gather,
        layers=graph.fit.fitted.layers,
        difference=graph.fit.fitted.difference,
        **measure_scores(
            *(info, graph.fit.before, stage / MODEL_FILE, data_dir, graph.signature),
            raw=raw_input_of(info, request.fold, data_dir, request.mean, request.std),
            workers=request.workers,
        ),
    )


def _require_all_built(failures: Mapping[str, SparseExportError], out: Path) -> None:
    """Raise the first failure; whatever else was built is in the bundle."""
    if not failures:
        return
    first, *rest = failures.values()
    more = "".join(f" {failure.what}" for failure in rest)
    raise type(first)(
        f"{first.what}{more} The bundle {out} has all the other targets.",
        expected=first.expected,
        do=first.do,
    ) from first
