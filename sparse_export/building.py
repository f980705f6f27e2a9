"""Makes a bundle from a run: the network as ONNX, with what is needed to check it anywhere."""

from __future__ import annotations

import copy
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from sparse_export import data, models, trust
from sparse_export.artefact import (
    BUNDLE_FILE,
    CACHE_FOLDER,
    RUN_FILE,
    Bundle,
    BundleInfo,
    CompactFact,
    FileFact,
    GraphLayer,
    PatternFact,
    Run,
    RunInfo,
    RunReference,
    command_line,
    file_facts,
    library_versions,
    now,
    open_run,
    save_bundle_info,
)
from sparse_export.engine.bundle import EngineProgress, Engines, add_engines
from sparse_export.engine.door import TARGETS as ENGINE_TARGETS
from sparse_export.engine.options import EngineOptions, Precision, require_buildable
from sparse_export.engine.plan import BuildPlan, planned_build, require_timeable
from sparse_export.engine.precision import CALIBRATED, TOLERANCE, at_precision
from sparse_export.errors import ArtefactError, GateFailed, SparseExportError, UnknownNameError, UsageError
from sparse_export.files import require_writable, sha256_file, staged_folder, write_bytes, write_json
from sparse_export.fitting import (
    ORDERS_FILE,
    layer_facts,
    masks_with_promises,
    measured,
    never_cut,
    require_in_plan,
    require_no_other_promise,
    rewritten,
    wanted_pattern,
)
from sparse_export.graph.export import INPUT_NAME, IR_VERSION, OPSET, OUTPUT_NAME, onnx_from_module
from sparse_export.graph.lossless import Gather, fit_pattern
from sparse_export.graph.pack24 import pack, pack_choices
from sparse_export.graph.verify import (
    count_parameters,
    graph_layers,
    promised_patterns,
    require_patterns,
)
from sparse_export.measure.twin import TimedEngines, time_engines
from sparse_export.models.lazy import give_shapes
from sparse_export.runtime.onnxruntime import open_session
from sparse_export.runtime.tolerance import outside_tolerance, spread
from sparse_export.sparsity.eligible import SMALL_SHARE
from sparse_export.sparsity.pattern import NMPattern
from sparse_export.trust import Given, remember

__all__ = [
    "DENSE_MODEL_FILE",
    "GOLDEN_INPUT",
    "GOLDEN_OUTPUT",
    "MODEL_FILE",
    "build",
    "dry_run",
    "masks_of_run",
    "network_of_run",
    "outside_tolerance",
]

WEIGHTS_FILE = "model.safetensors"
MASKS_FILE = "masks.safetensors"
MODEL_FILE = "model.onnx"
DENSE_MODEL_FILE = "model-dense.onnx"
LAYERS_FILE = "layers.json"
SUMS_FILE = "SHA256SUMS"
GOLDEN_INPUT = "golden/input.npy"
GOLDEN_OUTPUT = "golden/output.npy"
ATOL = 1e-6  # for logits that are all but equal; else the spread decides
RTOL = TOLERANCE["fp32"]

_TARGETS = ("onnx", *ENGINE_TARGETS)
_FORMS = ("dense", "packed", "both")
_REASONS_SHOWN = 8
_GOLDEN_SAMPLES = 8
_GOLDEN_SEED = 20
_CALIBRATION_BATCH = 32


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

    The ONNX file just written is run by onnxruntime on the golden input before anything takes its name.
    The digest of the manifest is remembered as this user's own.
    Raises UsageError, ArtefactError, NotTrustedError, OutputError, or GateFailed when the graph or its output is
    not that of the network, or when no weight is 2:4 that could be packed.  MissingCapability or EngineBuildFailed
    for a target that could not be built comes last: the bundle is there, with the others.
    """
    run_folder = Path(run.path if isinstance(run, Run) else run)
    module = run.module if isinstance(run, Run) else None
    possible = _possible(
        run_folder,
        out,
        targets=targets,
        engines=engines,
        onnx=onnx,
        precision=precision,
        time_layers=time_layers,
        pattern=pattern,
        max_cut=max_cut,
        gather=gather,
        planned_dense=planned_dense,
    )
    engine_options, wanted, out, target = possible.engines, possible.wanted, possible.out, possible.target
    require_writable(target.absolute().parent)
    opened = Run(path=run_folder, info=possible.info, module=module)
    info = opened.info
    network = network_of_run(opened, given=trust)
    masks = masks_of_run(opened, network)
    before = copy.deepcopy(network) if wanted is not None else None
    fitted = None
    if wanted is not None:
        sample = torch.from_numpy(_golden_input(info.model.input_shape))
        names_of_layers = [layer.name for layer in info.layers]
        fitted = fit_pattern(
            network,
            sample,
            wanted,
            names_of_layers,
            masks=masks,
            max_cut=max_cut,
            gather=gather,
            uncut=never_cut(
                network,
                sample,
                names_of_layers,
                wanted,
                small_share=SMALL_SHARE if planned_dense is None else 0.0,
            ),
            dense=planned_dense,
            live_first=compact,
        )
    samples = _calibration(info, precision, n_calibration, data_dir)
    golden_input, golden_output = _golden_pair(network, info.model.input_shape, samples)
    model = onnx_from_module(
        network, info.model.input_shape, masks=masks_with_promises(network, masks, fitted)
    )
    described = layer_facts(info.layers, network, masks, wanted, fitted)
    promised = promised_patterns(described)
    model, compact_fact = rewritten(model, info.model.input_shape, promised, fitted, compact)
    counts = count_parameters(model)  # before int8, whose weights are no floats
    model = at_precision(model, precision, samples)
    require_patterns(model, promised)  # of the graph that ships: compacting and gathering move columns
    layers = graph_layers(model)
    files = _model_files(model, onnx)
    with staged_folder(target) as stage:
        for name, content in files.items():
            write_bytes(stage / name, content)
        write_bytes(stage / GOLDEN_INPUT, _npy_bytes(golden_input))
        write_bytes(stage / GOLDEN_OUTPUT, _npy_bytes(golden_output))
        for name in files:
            _require_parity(stage / name, golden_input, golden_output, TOLERANCE[precision])
        built = add_engines(
            stage, model, layers, engine_options, precision=precision, previous=target, progress=progress
        )
        timed = TimedEngines(times={}, files=(), failures={})
        if time_layers:
            timed = time_engines(stage, model, engine_options, built, beside=target, progress=progress)
        write_json(stage / LAYERS_FILE, _layers_document(layers, built, timed))
        names = [*files, LAYERS_FILE, GOLDEN_INPUT, GOLDEN_OUTPUT, *built.files, *timed.files]
        pattern_fact = None
        if fitted is not None and before is not None:
            write_json(stage / ORDERS_FILE, fitted.document)
            names.append(ORDERS_FILE)
            accuracies = measured(info, before, stage / MODEL_FILE, data_dir)
            pattern_fact = PatternFact(
                pattern=str(wanted),
                max_cut=max_cut,
                gather=gather,
                layers=fitted.layers,
                difference=fitted.difference,
                **accuracies,
            )
        facts = file_facts(stage, names)
        bundle_info = replace(
            _bundle_info(opened, counts, layers, targets, facts, compact_fact),
            layers=described,
            density=_density(masks),
            fitted=pattern_fact,
            precision=precision,
            n_calibration=sum(map(len, samples)),
            opset=max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")),
            rtol=TOLERANCE[precision],
            targets=("onnx", *(one.target for one in built.facts)),
            engines=built.facts,
        )
        save_bundle_info(stage, bundle_info)
        remember(sha256_file(stage / BUNDLE_FILE))
    _require_all_built({**built.failures, **timed.failures}, out)
    return Bundle(path=out, info=bundle_info)


def dry_run(
    run: str | Path,
    out: str | Path | None = None,
    *,
    targets: Sequence[str] = ("onnx",),
    onnx: str = "dense",
    pattern: str | NMPattern | None = None,
    max_cut: float = 0.0,
    gather: Gather = "input",
    planned_dense: Mapping[str, str] | None = None,
    precision: Precision = "fp32",
    engines: Sequence[EngineOptions] = (),
    time_layers: bool = False,
) -> BuildPlan:
    """What `build` would write with the same arguments; nothing is loaded but what the libraries say of themselves.

    Raises what `build` would raise before it looks at the weights or any data.
    """
    possible = _possible(
        Path(run),
        out,
        targets=targets,
        engines=engines,
        onnx=onnx,
        precision=precision,
        time_layers=time_layers,
        pattern=pattern,
        max_cut=max_cut,
        gather=gather,
        planned_dense=planned_dense,
    )
    return planned_build(
        Path(run),
        possible.info,
        possible.out,
        engines=possible.engines,
        form=onnx,
        precision=precision,
        time_layers=time_layers,
    )


@dataclass(frozen=True, kw_only=True)
class _Possible:
    """A build that nothing is known against. out: the bundle; target: the same, links followed."""

    info: RunInfo
    engines: list[EngineOptions]
    wanted: NMPattern | None
    out: Path
    target: Path


def _possible(
    run: Path,
    out: str | Path | None,
    *,
    targets: Sequence[str],
    engines: Sequence[EngineOptions],
    onnx: str,
    precision: Precision,
    time_layers: bool,
    pattern: str | NMPattern | None,
    max_cut: float,
    gather: Gather,
    planned_dense: Mapping[str, str] | None,
) -> _Possible:
    """Whatever `build` can refuse by its arguments and the run's record."""
    _require_targets(targets)
    engine_options = _engine_options(targets, engines)
    for one in engine_options:
        require_buildable(precision, one.architectures)
    if time_layers:
        require_timeable(engine_options)
    _require_form(onnx)
    wanted = wanted_pattern(pattern, max_cut, gather)
    if planned_dense is not None and str(wanted) != "2:4":
        raise UsageError(
            f"A plan was given, and the pattern {wanted}.",
            expected="2:4 was expected: a plan decides which layers are worth that.",
            do="Ask for 2:4, or leave the plan out.",
        )
    info = open_run(run).info
    out = run.absolute().with_name(f"{run.absolute().name}-bundle") if out is None else Path(out)
    target = Path(os.path.realpath(out)) if out.is_symlink() else out
    _require_replaceable(target)
    require_no_other_promise(info.layers, wanted)
    if planned_dense is not None:
        require_in_plan(info.layers, planned_dense)
    return _Possible(info=info, engines=engine_options, wanted=wanted, out=out, target=target)


def _engine_options(targets: Sequence[str], engines: Sequence[EngineOptions]) -> list[EngineOptions]:
    """The options of each target that is an engine, in the order of the targets."""
    given = {one.target: one for one in engines}
    wanted = [target for target in ENGINE_TARGETS if target in targets]
    if len(given) != len(engines) or given.keys() - set(wanted):
        raise UsageError(
            f"There are options for {', '.join(one.target for one in engines)}.",
            expected=f"At most one for each engine target of {', '.join(targets)} was expected.",
        )
    return [given.get(target) or EngineOptions(target=target) for target in wanted]


def _layers_document(layers: Sequence[GraphLayer], built: Engines, timed: TimedEngines) -> dict[str, object]:
    rows = {file: [asdict(row) for row in rows] for file, rows in built.layers.items()}
    document: dict[str, object] = {"layers": [asdict(layer) for layer in layers], "engines": rows}
    if timed.times:
        document["times"] = {file: [asdict(one) for one in times] for file, times in timed.times.items()}
    return document


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


def _require_targets(targets: Sequence[str]) -> None:
    if isinstance(targets, str) or not targets:
        raise UsageError(
            f"The build targets are {targets!r}.",
            expected=f"A list of some of {', '.join(_TARGETS)} was expected.",
        )
    for target in targets:
        if target not in _TARGETS:
            raise UnknownNameError("build target", target, _TARGETS)


def _require_form(form: str) -> None:
    if form not in _FORMS:
        raise UnknownNameError("form of the ONNX file", form, _FORMS)


def _model_files(model: onnx.ModelProto, form: str) -> dict[str, bytes]:
    """The content of each model file, by name. Raises GateFailed when there is nothing to pack."""
    dense: bytes = model.SerializeToString(deterministic=True)
    if form == "dense":
        return {MODEL_FILE: dense}
    choices = pack_choices(model)
    if all(choice.reason is not None for choice in choices):
        reasons = "; ".join(f"{choice.weight}: {choice.reason}" for choice in choices[:_REASONS_SHOWN])
        more = f"; and {len(choices) - _REASONS_SHOWN} more" if len(choices) > _REASONS_SHOWN else ""
        raise GateFailed(
            f"No weight can be packed: {reasons or 'the graph has no layer with a weight'}{more}.",
            expected="At least one weight was expected to be 2:4 along its reduction axis.",
            do="Train with a 2:4 pattern, or build with the dense ONNX file.",
        )
    packed: bytes = pack(model).SerializeToString(deterministic=True)
    return {MODEL_FILE: packed} | ({DENSE_MODEL_FILE: dense} if form == "both" else {})


def _require_replaceable(out: Path) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if out.is_dir():
        if not any(out.iterdir()):
            return
        listed = _listed_files(out)
        if listed is not None:
            _require_nothing_else(out, listed)
            return
    raise UsageError(
        f"{out} exists and is not a bundle.",
        expected="A new or empty folder, or a bundle to replace, was expected, so that nothing else is lost.",
        do="Choose another place with --out.",
    )


def _listed_files(folder: Path) -> set[str] | None:
    """What the manifest of a bundle lists, itself and the sums included; None for what is no bundle."""
    try:
        document = json.loads((folder / BUNDLE_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or document.get("kind") != "bundle":
        return None
    files = document.get("files")
    return {BUNDLE_FILE, SUMS_FILE, *(files if isinstance(files, dict) else ())}


def _require_nothing_else(out: Path, listed: set[str]) -> None:
    for folder, folders, files in os.walk(out):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for path in sorted(Path(folder) / name for name in (*files, *links)):
            if path.is_relative_to(out / CACHE_FOLDER):  # what running it left there
                continue
            if path.relative_to(out).as_posix() not in listed:
                raise UsageError(
                    f"The bundle {out} holds {path}, which its {BUNDLE_FILE} does not list.",
                    expected="A bundle of nothing but its own files was expected, so that nothing else is lost.",
                    do="Move that file away, or choose another place with --out.",
                )


def network_of_run(run: Run, *, given: Given = None) -> nn.Module:
    """The trained network of a finished run, on the CPU, in eval mode; a copy of the one in memory, if any.

    given: SHA-256 of `run.json`, as `build` takes it.  Nothing is unpickled; a factory that this user does not
    vouch for is not imported.
    Raises NotTrustedError, UsageError (no way to make the network) or ArtefactError (weights of another one).
    """
    file = run.path / WEIGHTS_FILE
    network = copy.deepcopy(run.module) if run.module is not None else _fresh_network(run, given)
    network = network.cpu().eval()
    give_shapes(network, run.info.model.input_shape)
    state = _tensors(run, WEIGHTS_FILE)
    wanted = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    name = run.info.model.name or type(network).__name__
    problems = [
        *(f"it lacks {key}" for key in wanted.keys() - state.keys()),
        *(f"it has {key}, which the network has not" for key in state.keys() - wanted.keys()),
        *(
            f"{key} has shape {tuple(state[key].shape)} instead of {tuple(wanted[key].shape)}"
            for key in wanted.keys() & state.keys()
            if state[key].shape != wanted[key].shape
        ),
    ]
    if problems:
        shown = sorted(problems)[:8]
        more = f"; and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
        raise ArtefactError(
            f"{file} holds the weights of another network than {name}: {'; '.join(shown)}{more}.",
            expected=f"The weights of {name} were expected.",
            do="Use the code that the run was trained with, or the run that belongs to this code.",
        )
    network.load_state_dict(state)
    return network


def _fresh_network(run: Run, given: Given) -> nn.Module:
    name = run.info.model.name
    if name is None:
        raise UsageError(
            f"The run in {run.path} does not tell how its network is made.",
            expected="A known name or package.module:factory was expected, or the run with its network in memory.",
            do="Build it in the process that trained it, or train it with a factory.",
        )
    if models.is_factory(name):
        trust.require(sha256_file(run.path / RUN_FILE), f"The factory {name} in {run.path}", given=given)
    return models.create(name, run.info.model.n_classes)


def _tensors(run: Run, name: str) -> dict[str, Tensor]:
    file = run.path / name
    if name not in run.info.files:
        raise ArtefactError(
            f"{run.path / RUN_FILE} lists no {name}.",
            expected="Its hash was expected, so that the file can be checked.",
            do="Copy the run again, or train it again.",
        )
    try:
        return load(file.read_bytes())
    except (SafetensorError, OSError) as cause:
        raise ArtefactError(
            f"{file} cannot be read: {cause}.",
            expected="A safetensors file was expected.",
            do="Copy the run again, or train it again.",
        ) from cause


def masks_of_run(run: Run, network: nn.Module) -> dict[str, Tensor]:
    """The masks of a finished run by parameter name, True = kept; empty for a dense run.

    network: the trained one. Raises ArtefactError when masks, weights and `run.json` contradict each other.
    """
    file = run.path / MASKS_FILE
    masks = {name: mask.bool() for name, mask in _tensors(run, MASKS_FILE).items()}
    parameters = dict(network.named_parameters(remove_duplicate=False))
    facts = {layer.name: layer for layer in run.info.layers if layer.masked}
    if masks.keys() != facts.keys():
        raise ArtefactError(
            f"{file} has masks for {', '.join(sorted(masks)) or 'nothing'}.",
            expected=f"{RUN_FILE} tells of masks for {', '.join(sorted(facts)) or 'nothing'}.",
            do="Copy the run again, or train it again.",
        )
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            found = tuple(parameters[name].shape) if name in parameters else "no such parameter"
            raise ArtefactError(
                f"The mask for {name} in {file} has shape {tuple(mask.shape)}.",
                expected=f"The network has: {found}.",
            )
        n_active = int(mask.sum())
        if n_active != facts[name].n_active:
            raise ArtefactError(
                f"The mask for {name} in {file} keeps {n_active} weights.",
                expected=f"{RUN_FILE} tells of {facts[name].n_active}.",
            )
        if bool((parameters[name][~mask] != 0).any()):
            raise ArtefactError(
                f"{name} in {run.path} has weights other than zero where its mask is off.",
                expected="The accuracy on record was expected to be that of the masked network.",
                do="Train it again.",
            )
    density = _density(masks)
    if not math.isclose(density, run.info.density, rel_tol=0.0, abs_tol=1e-9):
        raise ArtefactError(
            f"The masks in {file} have density {density:.6f}.",
            expected=f"{RUN_FILE} tells of {run.info.density:.6f}.",
        )
    return masks


def _density(masks: Mapping[str, Tensor]) -> float:
    n_masked = sum(mask.numel() for mask in masks.values())
    return sum(int(mask.sum()) for mask in masks.values()) / n_masked if n_masked else 1.0


Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def _calibration(info: RunInfo, precision: Precision, n: int, data_dir: str | Path | None) -> list[Array]:
    """Batches of training inputs, for the precisions that need them."""
    if precision not in CALIBRATED:
        return []
    if n < _GOLDEN_SAMPLES:
        raise UsageError(
            f"{n} samples were given to calibrate on.", expected=f"At least {_GOLDEN_SAMPLES} were expected."
        )
    if info.data is None:
        raise UsageError(
            f"The run names no data set, and {precision} is calibrated on training samples.",
            expected="A run with a data set was expected.",
            do="Build as fp16 or bf16, which need none.",
        )
    found = data.load_training_sample(info.data, info.model.input_shape, n, data_dir)
    return [found[start : start + _CALIBRATION_BATCH] for start in range(0, len(found), _CALIBRATION_BATCH)]


def _golden_input(input_shape: Sequence[int]) -> Array:
    """Seeded standard normal inputs, (8, *input_shape)."""
    generator = np.random.default_rng(_GOLDEN_SEED)
    return generator.standard_normal((_GOLDEN_SAMPLES, *input_shape), dtype=np.float32)


def _golden_pair(
    network: nn.Module, input_shape: Sequence[int], samples: Sequence[Array]
) -> tuple[Array, Array]:
    """Inputs (8, *input_shape), and what torch makes of them.

    Of a calibrated graph the first samples, since ranges say nothing of other inputs; else the golden input.
    """
    inputs = samples[0][:_GOLDEN_SAMPLES] if samples else _golden_input(input_shape)
    try:
        with torch.inference_mode():
            outputs = network(torch.from_numpy(inputs))
    except Exception as cause:
        raise UsageError(
            f"The network {type(network).__name__} does not take inputs {inputs.shape}: {str(cause) or type(cause).__name__}.",
            expected=f"Samples of shape {tuple(input_shape)} were expected to fit, as {RUN_FILE} says.",
        ) from cause
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != len(inputs):
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise UsageError(
            f"The network {type(network).__name__} returns {found} for inputs {inputs.shape}.",
            expected=f"Logits ({len(inputs)}, classes) were expected.",
            do="Wrap it in a module that returns the logits alone.",
        )
    golden = outputs.numpy()
    if not np.isfinite(golden).all():
        raise GateFailed(
            f"The network {type(network).__name__} gives NaN or infinity for standard normal inputs.",
            expected="Finite logits were expected.",
            do="Look at its weights: training may have diverged.",
        )
    return inputs, golden


def _npy_bytes(array: Array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _require_parity(file: Path, golden_input: Array, golden_output: Array, rtol: float) -> None:
    with open_session(file) as session:
        found = session.run(golden_input)
    largest, outside = outside_tolerance(found, golden_output, atol=ATOL, rtol=rtol)
    if outside:
        raise GateFailed(
            f"The exported graph differs from the network by {largest:.3g} on {len(golden_input)} inputs.",
            expected=f"At most {ATOL:g} + {rtol:g} * {spread(golden_output):.3g} was expected.",
            do="The export is wrong, or its precision too low for this network; nothing was written.",
        )


def _bundle_info(
    run: Run,
    counts: tuple[int, int],
    layers: Sequence[GraphLayer],
    targets: Sequence[str],
    facts: Mapping[str, FileFact],
    compact_fact: CompactFact | None,
) -> BundleInfo:
    info: RunInfo = run.info
    n_parameters, n_nonzero = counts
    macs = [layer.macs for layer in layers]
    nonzero_macs = [layer.nonzero_macs for layer in layers]
    return BundleInfo(
        method=info.method,
        model=info.model,
        data=info.data,
        run=RunReference(path=str(run.path.resolve()), run_sha256=sha256_file(run.path / RUN_FILE)),
        precision="fp32",
        targets=tuple(dict.fromkeys(targets)),
        opset=OPSET,
        ir_version=IR_VERSION,
        input_name=INPUT_NAME,
        output_name=OUTPUT_NAME,
        density=info.density,
        layers=info.layers,
        n_parameters=n_parameters,
        n_nonzero=n_nonzero,
        macs=_total(macs),
        nonzero_macs=_total(nonzero_macs),
        accuracy=info.test,
        atol=ATOL,
        rtol=RTOL,
        versions=library_versions(),
        command=command_line(),
        created=now(),
        files=dict(facts),
        compacted=compact_fact,
    )


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None
