"""The values that stages hand to each other, and how they are read from disk and written to it.

A run is a folder written by training, a bundle a folder written by build. Each has one JSON document that
describes it (`run.json`, `manifest.json`) with the size and SHA-256 of every other file in it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import operator
import platform
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from sparse_export.errors import ArtefactError, UsageError
from sparse_export.files import json_bytes, put_back, sha256_file, write_json
from sparse_export.listed import FileFact as FileFact  # noqa: PLC0414 - handed on by this module
from sparse_export.listed import file_facts as file_facts  # noqa: PLC0414 - handed on by this module
from sparse_export.listed import listed_bytes, listed_file, listed_graph, require_listed
from sparse_export.listed import verify_files as verify_files  # noqa: PLC0414 - handed on by this module

SCHEMA_VERSION = 1
RUN_FILE = "run.json"
BUNDLE_FILE = "manifest.json"
SUMS_FILE = "SHA256SUMS"
WEIGHTS_FILE = "model.safetensors"
MASKS_FILE = "masks.safetensors"
MODEL_FILE = "model.onnx"
LAYERS_FILE = "layers.json"
ORDERS_FILE = "orders.json"
GOLDEN_INPUT = "golden/input.npy"
GOLDEN_OUTPUT = "golden/output.npy"
CACHE_FOLDER = "cache/onnxruntime-tensorrt"
"""Of a bundle: what may come to be there after it was built, and is no part of it."""


@dataclass(frozen=True, kw_only=True)
class ModelFact:
    """Which network: a known name or `package.module:factory`, and its shapes.

    name: None when the network was handed over in memory and cannot be made again from a name.
    input_shape: of one sample, without the batch axis.
    """

    name: str | None
    input_shape: tuple[int, ...]
    n_classes: int


@dataclass(frozen=True, kw_only=True)
class DataFact:
    """Which data, and how it is fed: (x - mean) / std per channel, after scaling to 0..1 where it was uint8.

    test_sha256: of the raw test inputs and labels, so that another test set is noticed.  crop_ratio: of pictures
    from a folder, the share of the scaled picture that the middle cut keeps along its shorter side.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    n_train: int
    n_validation: int
    n_test: int
    test_sha256: str
    crop_ratio: float = 1.0


@dataclass(frozen=True, kw_only=True)
class LayerFact:
    """One weight: its shape and how many of its entries are kept.

    masked: False for a layer that was left dense.  pattern: an N:M pattern that it promises, or None.
    why_dense: where the network was trained to a pattern, why this layer was not.
    """

    name: str
    shape: tuple[int, ...]
    n_weights: int
    n_active: int
    masked: bool
    pattern: str | None = None
    why_dense: str | None = None

    @property
    def density(self) -> float:
        return self.n_active / self.n_weights


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Correct predictions among samples, of which there is one at least.

    Raises:
        UsageError: numbers that are not whole, like a mean error, or counts that cannot be.
    """

    n_correct: int
    n_samples: int

    def __post_init__(self) -> None:
        for name in ("n_correct", "n_samples"):
            given = getattr(self, name)
            try:
                object.__setattr__(self, name, operator.index(given))
            except TypeError as cause:
                raise UsageError(
                    f"{name} of an accuracy is {given!r}.",
                    expected="A count of samples was expected.",
                    do="Record no accuracy for a score that is not a share of samples.",
                ) from cause
        if self.n_samples < 1 or not 0 <= self.n_correct <= self.n_samples:
            raise UsageError(
                f"An accuracy has {self.n_correct} right answers among {self.n_samples} samples.",
                expected="At least 1 sample and no more right answers than samples were expected.",
            )

    @property
    def percent(self) -> float:
        return 100.0 * self.n_correct / self.n_samples


@dataclass(frozen=True, kw_only=True)
class SpeedFact:
    """What was measured of a run's speed, and beside it the paper's two estimates, which are no measurements.

    step_ms: median over the epochs of the mean wall time of a training step, data, mask passes and mask updates included
    (those once an epoch by the epoch's number of steps), tests not; other processes on the machine lengthen it.
    estimate_channels: dense time / the time that convolutions would take without their empty channels.
    estimate_macs: the same without any multiplication by zero.  See `sparse_export.train.speed.estimate`. None where
    there is no convolution.  all_layers_*: the same with linear layers counted too, which the paper does not do.
    n_moments: epochs that the estimates were taken over.  left_out: layers that could not be looked at, with a reason.
    """

    step_ms: float
    estimate_channels: float | None
    estimate_macs: float | None
    all_layers_estimate_channels: float | None
    all_layers_estimate_macs: float | None
    n_moments: int
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ProductFact:
    """How a masked weight was multiplied by in training, where products that leave inactive weights out were asked for.

    by: `csr` or `2:4` for such products, `dense`.  density: of the weight when this was decided.  n_rows: of activations in a step.
    dense_ms, csr_ms: medians of the three products of a step, timed in turn at the start; None where nothing was timed.
    reason: one clause that says why.
    """

    name: str
    by: Literal["csr", "2:4", "dense"]
    density: float
    n_rows: int | None
    dense_ms: float | None
    csr_ms: float | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """Content of `run.json`.

    status: `running` until the last epoch is done; `files` is complete only with `complete`.
    density: kept / total over the masked layers (1 for a dense run); target_density: what was asked for.
    seconds: wall time in training, over all resumptions.  n_processes: that trained together at the end.
    products: one entry for each masked weight, where other products than dense ones were asked for.
    """

    status: Literal["running", "complete"]
    method: str
    model: ModelFact
    data: DataFact | None
    target_density: float
    density: float
    n_active: int
    n_masked: int
    n_parameters: int
    layers: tuple[LayerFact, ...]
    validation: Accuracy | None
    test: Accuracy | None
    seed: int
    n_threads: int
    device: str
    epochs: int
    n_steps: int
    seconds: float
    recipe: dict[str, Any]
    versions: dict[str, str]
    command: tuple[str, ...]
    created: str
    files: dict[str, FileFact]
    n_processes: int = 1
    speed: SpeedFact | None = None
    products: tuple[ProductFact, ...] = ()
    kind: Literal["run"] = "run"
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, kw_only=True)
class RunReference:
    """Where a bundle came from. path: as it was at build time; run_sha256: of its `run.json`."""

    path: str
    run_sha256: str


Eligible = Literal["yes", "no", "unproven"]
ReasonCode = Literal[
    "groups-over",
    "indivisible",
    "depthwise",
    "grouped",
    "vector",
    "empty",
    "float32",
    "other-type",
    "zero-point",
    "sparse-initializer",
    "not-constant",
    "activations",
    "int8",
    "weight-only",
    "unaligned",
    "kernel-unknown",
    "masked-in-graph",
    "computed",
    "overridable",
    "subgraph",
    "not-evaluated",
    "not-looked-into",
    "shared",
]


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why hardware cannot use a layer's zeros, or may not. code: for machines; text: one sentence for people."""

    code: ReasonCode
    text: str


@dataclass(frozen=True, kw_only=True)
class GraphLayer:
    """One Conv, ConvTranspose, Gemm or MatMul of an ONNX graph, or a node with weights that was not looked into.

    weight: name of the stored tensor; where there is none, of the value multiplied by.  constant: is it one?
    through: the operators between node and stored tensor, from the node up; empty when it is used as stored.
    shape, dtype: of the weight as the node multiplies by it; () and None when not known.  reduction_axis: the
    axis of that shape that is summed over (input channels for Conv).  stored_axis: the same axis in the
    stored tensor, None where it is not one axis of it.
    macs: multiply-accumulates by weights for one sample, every weight counted; nonzero_macs: with zero
    weights left out. Both are None when the shapes are not known, 0 where nothing constant is multiplied by.

    pattern_holds: 2:4 along the reduction axis; None when the weight is not known.  n_groups, n_groups_over:
    groups of four, and those with more than two nonzeros; None where four does not divide the axis.
    obeys: the tightest N:M that hold, M of 2, 4, 8, 16, without those that follow from another.
    eligible: can hardware that knows 2:4 use the zeros?  reasons: why not, or what there is to know.
    """

    node: str
    op_type: str
    weight: str
    shape: tuple[int, ...]
    reduction_axis: int
    n_weights: int
    n_nonzero: int
    macs: int | None
    nonzero_macs: int | None
    # Documents older than these fields are read with the defaults.
    constant: bool = True
    through: tuple[str, ...] = ()
    dtype: str | None = None
    stored_axis: int | None = None
    pattern_holds: bool | None = None
    n_groups: int | None = None
    n_groups_over: int | None = None
    obeys: tuple[str, ...] = ()
    eligible: Eligible = "unproven"
    reasons: tuple[Reason, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CompactedLayer:
    """A layer of the graph, shapes of its weight as stored before and after dead channels went.

    why: what kept it from losing more.
    """

    node: str
    weight: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    why: str


@dataclass(frozen=True, kw_only=True)
class CompactFact:
    """What went with the dead channels of a graph.

    n_removed: output channels of layers.  n_inputs_dropped: inputs that layers no longer read.
    n_weights_before, n_weights_after: entries of all float initializers.
    """

    n_removed: int
    n_inputs_dropped: int
    n_weights_before: int
    n_weights_after: int
    layers: tuple[CompactedLayer, ...]


EngineState = Literal["picked", "not picked", "not eligible", "unknown", "unproven"]


@dataclass(frozen=True, kw_only=True)
class EngineLayer:
    """What became of one layer of the graph in an engine: does it run on a sparse kernel?

    state: `unknown` where the builder does not tell, `unproven` where the graph alone leaves it open.  text: why.
    kernels: the sparse ones that the inspector named.
    """

    node: str
    weight: str
    state: EngineState
    text: str
    kernels: tuple[str, ...] = ()


TimingOutcome = Literal["speed-up", "slow-down", "no speed-up", "not compared"]


@dataclass(frozen=True, kw_only=True)
class LayerTiming:
    """The time of the same work in two engines of one graph: one built without sparse kernels, one with them.

    nodes: of the graph, all that the work is; empty for a layer of the engine's own.  weights: that these multiply by.
    dense_layers, sparse_layers: names in the engines; dense_kernels, sparse_kernels: those that the inspector names.
    dense_ms, sparse_ms: of an undisturbed pass, None where an engine has no such layer, or one too short to time.
    ratio: dense / sparse, with its 95 % interval low to high.  floor: the farthest that the same ratio of the dense
    engine and a second copy of it comes from 1.
    """

    nodes: tuple[str, ...]
    weights: tuple[str, ...]
    dense_layers: tuple[str, ...]
    sparse_layers: tuple[str, ...]
    dense_kernels: tuple[str, ...]
    sparse_kernels: tuple[str, ...]
    dense_ms: float | None
    sparse_ms: float | None
    ratio: float | None
    low: float | None
    high: float | None
    floor: float | None
    outcome: TimingOutcome
    verdict: str


@dataclass(frozen=True, kw_only=True)
class EngineTimes:
    """Layers of an engine timed against its twin without sparse kernels, at one batch size.

    rows: empty where nothing was timed, and `note` says why.  whole: all layers of a pass together.  rounds: of
    interleaved blocks; steady: whether times had settled when warm-up ended.
    """

    batch: int
    rows: tuple[LayerTiming, ...]
    whole: LayerTiming | None
    rounds: int
    steady: bool
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class EngineFact:
    """An engine of a bundle: a plan of native code for one library and certain GPUs.

    file: relative to the bundle.  target: `tensorrt` or `tensorrt-rtx`; version: of that library.  gpu,
    architecture: what it was built on, None without a GPU.  architectures: what TensorRT for RTX was told to build
    for, empty for its own choice.  hardware, version_compatible: what else it is to run on.  profiles: batch sizes
    (min, opt, max).  sparse: sparse kernels were allowed.  parse_s, build_s: seconds in the library.
    onnx_sha256: of the dense graph that was parsed.  timing_cache: its file, if any.
    """

    file: str
    target: Literal["tensorrt", "tensorrt-rtx"]
    precision: str
    version: str
    gpu: str | None
    architecture: str | None
    architectures: tuple[str, ...]
    hardware: str
    version_compatible: bool
    profiles: tuple[tuple[int, int, int], ...]
    sparse: bool
    parse_s: float
    build_s: float
    onnx_sha256: str
    timing_cache: str | None = None


Road = Literal["as trained", "permuted", "gathered", "dense"]


@dataclass(frozen=True, kw_only=True)
class PatternLayer:
    """What became of a weight that was to obey a pattern, without or with a small cut.

    road: how it came to obey it, `dense` for one that was left as it was; `reason` then says why.  density: nonzeros
    / weights before.  n_groups, groups_over_*: groups, and those with more than N nonzeros before, and in the order
    that the layer has now or, where it stayed dense, the best that was tried.  cut_needed: share of sum |w| that
    obeying the pattern would cut in that order.  cut: what was cut, in share of sum |w|; n_cut: in weights.
    None where there are no groups, or no order was tried.
    """

    name: str
    shape: tuple[int, ...]
    density: float
    road: Road
    n_groups: int | None
    groups_over_before: int | None
    groups_over_after: int | None
    cut_needed: float | None
    cut: float
    n_cut: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class PatternFact:
    """What came of making a trained network obey a pattern: layers in the run's order.

    max_cut: share of sum |w| that a layer might lose.  difference: the largest between the network's outputs before
    and after its channels were permuted, over the largest output, in float64; cuts are not in it.
    accuracy_before: of the run's network, by PyTorch; accuracy_after: of the ONNX file, by onnxruntime, on the same
    samples; n_changed: samples that are put into another class.  not_measured: why these three are None.
    """

    pattern: str
    max_cut: float
    gather: Literal["none", "input", "any"]
    layers: tuple[PatternLayer, ...]
    difference: float
    accuracy_before: Accuracy | None
    accuracy_after: Accuracy | None
    n_changed: int | None
    not_measured: str | None


@dataclass(frozen=True, kw_only=True)
class BundleInfo:
    """Content of `manifest.json`.

    accuracy: what the run reported on its test set.  n_parameters, n_nonzero: over all float initializers of
    the graph.  macs, nonzero_macs: for one sample.  atol, rtol: what the golden pair is held to.
    compacted: None for a graph that has all its channels.  fitted: None where no pattern was asked for; where it
    cut weights, `layers` and `density` tell of what is left, and `accuracy` still of the whole run.
    engines: those of the targets other than `onnx`.  precision: of the graph, its inputs and outputs being float32.
    n_calibration: training samples that int8 and fp8 took their ranges from.
    """

    method: str
    model: ModelFact
    data: DataFact | None
    run: RunReference
    precision: str
    targets: tuple[str, ...]
    opset: int
    ir_version: int
    input_name: str
    output_name: str
    density: float
    layers: tuple[LayerFact, ...]
    n_parameters: int
    n_nonzero: int
    macs: int | None
    nonzero_macs: int | None
    accuracy: Accuracy | None
    atol: float
    rtol: float
    versions: dict[str, str]
    command: tuple[str, ...]
    created: str
    files: dict[str, FileFact]
    compacted: CompactFact | None = None
    engines: tuple[EngineFact, ...] = ()
    n_calibration: int = 0
    fitted: PatternFact | None = None
    kind: Literal["bundle"] = "bundle"
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run on disk. module: the live network when it is still in memory, else None."""

    path: Path
    info: RunInfo
    module: Any = None


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle on disk."""

    path: Path
    info: BundleInfo

    @property
    def onnx_path(self) -> Path:
        """The path of `model.onnx`, which is checked each time.

        Raises:
            ArtefactError: the manifest does not list it, or a file with its external data; or one of them is not
                the file that was written.
        """
        return listed_graph(self.path, self.info.files, MODEL_FILE, described_by=BUNDLE_FILE)


def file_of(artefact: Run | Bundle, name: str) -> Path:
    """The path of a file of a run or a bundle, checked now; nothing opens one by any other way.

    Args:
        artefact: an opened run or bundle.
        name: as its description lists the file.

    Raises:
        ArtefactError: the description does not list it, or it is not the file that was written.
    """
    return listed_file(artefact.path, artefact.info.files, name, described_by=_description(artefact))


def bytes_of(artefact: Run | Bundle, name: str) -> bytes:
    """The content of a file of a run or a bundle, the very bytes that were checked. As `file_of`."""
    return listed_bytes(artefact.path, artefact.info.files, name, described_by=_description(artefact))


def _description(artefact: Run | Bundle) -> str:
    return RUN_FILE if isinstance(artefact, Run) else BUNDLE_FILE


def now() -> str:
    """The time, UTC, as ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def command_line() -> tuple[str, ...]:
    """The words this process was started with, program name shortened."""
    program = Path(sys.argv[0])
    return ("sparse-export" if program.name == "__main__.py" else program.name, *sys.argv[1:])


_LIBRARIES = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime", "numpy")
_ENGINES = ("tensorrt-cu13", "tensorrt-rtx-cu13", "tensorrt", "tensorrt-rtx")


def library_versions() -> dict[str, str]:
    """Versions of ourselves, Python and the libraries that decide a result; imports none of them."""
    import sparse_export

    found = {"sparse-export": sparse_export.__version__, "python": platform.python_version()}
    for name in (*_LIBRARIES, *_ENGINES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; a key that comes twice would be read by others as the other one."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twice!r} comes twice in one object")
    return found


def _parse(path: Path, kind: str, cls: type[Any]) -> Any:
    import pydantic

    try:
        document = json.loads(
            path.read_bytes(), parse_constant=_refuse_constant, object_pairs_hook=_without_repetition
        )
    except OSError as cause:
        raise ArtefactError(
            f"{path} cannot be read: {cause.strerror or cause}.",
            expected=f"A {kind} description that this user may read was expected.",
            do="Look at its permissions, or copy the folder again.",
        ) from cause
    except (ValueError, RecursionError) as cause:
        raise ArtefactError(
            f"{path} is not JSON: {cause}.",
            expected=f"A {kind} description was expected.",
            do="Make it again.",
        ) from cause
    found = document.get("kind") if isinstance(document, dict) else None
    if found != kind:
        raise ArtefactError(f"{path} describes {found!r}.", expected=f"A {kind} was expected.")
    version = document.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ArtefactError(
            f"{path} has schema version {version!r}.",
            expected=f"This release reads versions up to {SCHEMA_VERSION}.",
            do="Install a newer sparse-export.",
        )
    try:
        return pydantic.TypeAdapter(cls).validate_python(document)
    except pydantic.ValidationError as cause:
        first = cause.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtefactError(
            f"{path} is damaged at {where!r}: {first['msg']}.", do="Make it again."
        ) from cause


def read_document(path: Path, kind: str, cls: type[Any]) -> Any:
    """Read a JSON document of ours into its dataclass, which has `kind` and `schema_version`. Raises ArtefactError."""
    return _parse(path, kind, cls)


def _described(path: Path, file: str, kind: str, made_by: str) -> Path:
    put_back(path)
    if not path.exists():
        raise UsageError(
            f"{path} does not exist.", expected=f"A {kind} folder, made by `{made_by}`, was expected."
        )
    if not (path / file).is_file():
        raise ArtefactError(
            f"{path} is not a {kind}: it holds no {file}.",
            expected=f"A folder made by `{made_by}` was expected.",
            do="Run `sparse-export inspect` on it to see what it is." if path.is_file() else "",
        )
    return path / file


def required_files(info: RunInfo | BundleInfo) -> tuple[str, ...]:
    """The files that a finished run, or a bundle, cannot do without; every release has listed them.

    Of a run weights and masks, none while it is unfinished. Of a bundle the graph, the golden pair, the table of
    layers, the orders of one that was fitted to a pattern, and what its engines name.
    """
    if isinstance(info, RunInfo):
        return (WEIGHTS_FILE, MASKS_FILE) if info.status == "complete" else ()
    names = [MODEL_FILE, GOLDEN_INPUT, GOLDEN_OUTPUT, LAYERS_FILE]
    names += [ORDERS_FILE] if info.fitted is not None else []
    for fact in info.engines:
        names += [fact.file] if fact.timing_cache is None else [fact.file, fact.timing_cache]
    return tuple(dict.fromkeys(names))


def require_complete(folder: Path, info: RunInfo | BundleInfo) -> None:
    """Raise ArtefactError for the first of `required_files` that the description of a folder does not list."""
    described_by = RUN_FILE if isinstance(info, RunInfo) else BUNDLE_FILE
    require_listed(folder, info.files, required_files(info), described_by=described_by)


def run_digest(info: RunInfo) -> str:
    """Hex SHA-256 of the `run.json` that `save_run_info` writes, known before it is written."""
    return hashlib.sha256(json_bytes(asdict(info))).hexdigest()


def save_run_info(folder: Path, info: RunInfo) -> None:
    """Write `run.json`."""
    write_json(folder / RUN_FILE, asdict(info))


def read_run_info(folder: Path) -> RunInfo:
    """Read `run.json`, of a finished run or not. Raises UsageError or ArtefactError."""
    file = _described(Path(folder), RUN_FILE, "run", "sparse-export train")
    info: RunInfo = _parse(file, "run", RunInfo)
    return info


def open_run(folder: Path) -> Run:
    """Read a finished run; weights and masks have to be listed, and every listed file whole. Raises UsageError or ArtefactError."""
    folder = Path(folder)
    info = read_run_info(folder)
    if info.status != "complete":
        raise ArtefactError(
            f"The run in {folder} is not finished.",
            expected="A finished run was expected.",
            do=f"Go on with `sparse-export train --resume --out {folder}`.",
        )
    require_complete(folder, info)
    verify_files(folder, info.files)
    return Run(path=folder, info=info)


def save_bundle_info(folder: Path, info: BundleInfo) -> None:
    """Write `manifest.json`, then `SHA256SUMS` over it and every file that it lists."""
    write_json(folder / BUNDLE_FILE, asdict(info))
    sums = {name: fact.sha256 for name, fact in info.files.items()}
    sums[BUNDLE_FILE] = sha256_file(folder / BUNDLE_FILE)
    lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
    (folder / SUMS_FILE).write_text("".join(lines))


def read_bundle_info(folder: Path) -> BundleInfo:
    """Read `manifest.json`; the other files are not looked at. Raises UsageError or ArtefactError."""
    file = _described(Path(folder), BUNDLE_FILE, "bundle", "sparse-export build")
    info: BundleInfo = _parse(file, "bundle", BundleInfo)
    return info


def read_engine_layers(file: Path, engine: str) -> tuple[EngineLayer, ...]:
    """The rows of an engine in a `layers.json`, none when it has none. Raises ArtefactError."""
    rows: tuple[EngineLayer, ...] = _told_of_engine(file, "engines", engine, tuple[EngineLayer, ...])
    return rows


def read_engine_times(file: Path, engine: str) -> tuple[EngineTimes, ...]:
    """Likewise the times of its layers, one entry a batch size, none where they were not measured."""
    times: tuple[EngineTimes, ...] = _told_of_engine(file, "times", engine, tuple[EngineTimes, ...])
    return times


def _told_of_engine(file: Path, key: str, engine: str, cls: Any) -> Any:
    import pydantic

    try:
        document = json.loads(file.read_bytes(), parse_constant=_refuse_constant)
        engines = document.get(key, {}) if isinstance(document, dict) else {}
        return pydantic.TypeAdapter(cls).validate_python(engines.get(engine, ()))
    except (OSError, ValueError, RecursionError, AttributeError) as cause:
        raise ArtefactError(
            f"{file} cannot be read: {str(cause).strip().partition(chr(10))[0]}.",
            expected="The table of layers that a build writes was expected.",
            do="Build the bundle again.",
        ) from cause


def open_bundle(folder: Path) -> Bundle:
    """Read a bundle; `required_files` have to be listed, and every listed file whole. Raises UsageError or ArtefactError."""
    folder = Path(folder)
    info = read_bundle_info(folder)
    require_complete(folder, info)
    verify_files(folder, info.files)
    return Bundle(path=folder, info=info)
