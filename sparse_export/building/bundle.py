"""Writes the bundle of a run, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sparse_export.building.dense_baseline import TimedEngines, time_engines
from sparse_export.building.engines import EngineProgress, Engines, add_engines
from sparse_export.building.golden import GOLDEN_INPUT, GOLDEN_OUTPUT, require_parity, write_golden
from sparse_export.building.graph import MadeGraph, graph_of_run
from sparse_export.building.manifest import bundle_info, layers_document
from sparse_export.building.model_files import MODEL_FILE, model_files
from sparse_export.building.patterns import ORDERS_FILE, measured
from sparse_export.building.replaceable import require_replaceable
from sparse_export.building.request import BuildRequest, PossibleBuild, possible_build
from sparse_export.engines.dry_run import BuildPlan, planned_build
from sparse_export.engines.options import EngineOptions, Precision
from sparse_export.engines.precision import TOLERANCE
from sparse_export.errors import SparseExportError
from sparse_export.files import claimed, require_writable, sha256_file, staged_folder, write_bytes, write_json
from sparse_export.formats.bundle import BUNDLE_FILE, Bundle, PatternInfo, save_bundle_info
from sparse_export.formats.layers import LAYERS_FILE
from sparse_export.formats.listed import file_facts
from sparse_export.formats.run import Run, RunInfo
from sparse_export.graph.passes.fit_pattern import Gather
from sparse_export.sparsity.pattern import NMPattern
from sparse_export.trust import remember

__all__ = ["build", "build_as_asked", "dry_run"]


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
    progress: EngineProgress | None = None,
    trust: str | None = None,
) -> Bundle:
    """Write the bundle of a finished run, whole or not at all.

    run: a run or its folder; its files are checked by hash, the network in memory is used where there is one.
    out: `<run>-bundle` beside the run by default; a bundle that stands there is replaced, unless it holds
    files that it does not list; a link is followed.  targets: what to build for; the ONNX file is always
    written.  precision: of the graph, and so of the engines; inputs and outputs are float32 in any.
    n_calibration: training samples that int8 and fp8 take their ranges from; data_dir: where the data sets lie.
    engines: how to build for a target, where not by the defaults; time_layers: build each engine once more without
    sparse kernels, and time the layers of both against each other, which needs the GPU.  progress: is told how engines get on.
    compact: take the channels that do nothing out of the graph; the outputs are held against those of the whole
    graph first.  onnx: `packed` writes 2:4 weights packed, `both` adds the dense form as `model-dense.onnx`.
    pattern: put channels into an order in which layers obey N:M, and promise it for those that do; `max_cut` is the
    share of sum |w| that such a layer may lose, `gather` says which layers may be given their input in an order of
    their own: those that read the network's `input`, `any` or `none`; `planned_dense` names weights that a plan leaves
    dense, with its reasons (`sparse_export.plan.planning.dense_by_plan`), and then decides about small layers too. Accuracy is then measured before and after,
    where the test set lies in data_dir.
    trust: SHA-256 of the run's `run.json`, needed once for a run that names a factory and was made elsewhere.

    The ONNX file just written is run by onnxruntime on the golden input, in batches of 1, 2, 3 and 8, before anything
    takes its name.
    The digest of the manifest is remembered as this user's own.
    Raises UsageError, FolderInUse, ArtefactError, NotTrustedError, OutputError, or GateFailed when the graph or its output is
    not that of the network, or when no weight is 2:4 that could be packed.  MissingCapability or EngineBuildFailed
    for a target that could not be built comes last: the bundle is there, with the others.
    """
    asked = BuildRequest(
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
    )
    return build_as_asked(run, out, asked, data_dir=data_dir, progress=progress, trust=trust)


def build_as_asked(
    run: Run | str | Path,
    out: str | Path | None,
    asked: BuildRequest,
    *,
    data_dir: str | Path | None = None,
    progress: EngineProgress | None = None,
    trust: str | None = None,
) -> Bundle:
    """`build`, with what is asked for in one value."""
    folder, module = (Path(run.path), run.module) if isinstance(run, Run) else (Path(run), None)
    possible = possible_build(folder, out, asked)
    require_writable(possible.target.absolute().parent)
    with claimed(possible.target):
        require_replaceable(possible.target)  # now that nobody else writes there
        opened = Run(path=folder, info=possible.info, module=module)
        made = graph_of_run(opened, asked, possible.wanted, data_dir=data_dir, trust=trust)
        files = model_files(made.model, asked.onnx)
        with staged_folder(possible.target) as stage:
            _write_models(stage, files, made, asked.precision)
            built, timed = _add_engines(stage, made, possible, asked, progress)
            write_json(stage / LAYERS_FILE, layers_document(made.layers, built, timed))
            names = [*files, LAYERS_FILE, GOLDEN_INPUT, GOLDEN_OUTPUT, *built.files, *timed.files]
            fitted = _write_orders(stage, made, asked, possible.info, data_dir)
            if fitted is not None:
                names.append(ORDERS_FILE)
            info = bundle_info(
                opened,
                made,
                precision=asked.precision,
                built=built,
                fitted=fitted,
                files=file_facts(stage, names),
            )
            save_bundle_info(stage, info)
            remember(sha256_file(stage / BUNDLE_FILE))
    _require_all_built({**built.failures, **timed.failures}, possible.out)
    return Bundle(path=possible.out, info=info)


def dry_run(run: str | Path, out: str | Path | None, asked: BuildRequest) -> BuildPlan:
    """What `build_as_asked` would write; nothing is loaded but what the libraries say of themselves.

    Raises what that would raise before it looks at the weights or any data.
    """
    possible = possible_build(Path(run), out, asked)
    return planned_build(
        Path(run),
        possible.info,
        possible.out,
        engines=possible.engines,
        form=asked.onnx,
        precision=asked.precision,
        time_layers=asked.time_layers,
    )


def _write_models(stage: Path, files: Mapping[str, bytes], made: MadeGraph, precision: Precision) -> None:
    """Write the model files and the golden pair, and hold each of the files to it."""
    for name, content in files.items():
        write_bytes(stage / name, content)
    write_golden(stage, made.golden)
    for name in files:
        require_parity(stage / name, made.golden, TOLERANCE[precision])


def _add_engines(
    stage: Path,
    made: MadeGraph,
    possible: PossibleBuild,
    asked: BuildRequest,
    progress: EngineProgress | None,
) -> tuple[Engines, TimedEngines]:
    """Build the engines, and time their layers if that was asked for."""
    built = add_engines(
        stage,
        made.model,
        made.layers,
        possible.engines,
        precision=asked.precision,
        previous=possible.target,
        progress=progress,
    )
    if not asked.time_layers:
        return built, TimedEngines(times={}, files=(), failures={})
    timed = time_engines(
        stage, made.model, possible.engines, built, beside=possible.target, progress=progress
    )
    return built, timed


def _write_orders(
    stage: Path, made: MadeGraph, asked: BuildRequest, info: RunInfo, data_dir: str | Path | None
) -> PatternInfo | None:
    """Write what was permuted and cut for a pattern, and measure what that did to the accuracy; None without one."""
    if made.fit is None:
        return None
    write_json(stage / ORDERS_FILE, made.fit.fitted.document)
    return PatternInfo(
        pattern=str(made.fit.pattern),
        max_cut=asked.max_cut,
        gather=asked.gather,
        layers=made.fit.fitted.layers,
        difference=made.fit.fitted.difference,
        **measured(info, made.fit.before, stage / MODEL_FILE, data_dir),
    )


def _require_all_built(failures: Mapping[str, SparseExportError], out: Path) -> None:
    """Raise the first failure; whatever else was built is in the bundle."""
    if not failures:
        return
    first, *others = failures.values()
    more = "".join(f" {other.what}" for other in others)
    raise type(first)(
        f"{first.what}{more} The bundle {out} has all the other targets.",
        expected=first.expected,
        do=first.do,
    ) from first
