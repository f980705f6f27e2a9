"""`manifest.json`: a bundle, what it holds and where it came from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from sparse_export.files import sha256_file, write_json
from sparse_export.formats.document import SCHEMA_VERSION, _described, _parse
from sparse_export.formats.engines import EngineInfo
from sparse_export.formats.layers import LAYERS_FILE
from sparse_export.formats.listed import (
    FileInfo,
    listed_bytes,
    listed_file,
    listed_graph,
    require_listed,
    verify_files,
)
from sparse_export.formats.run import (
    MASKS_FILE,
    RUN_FILE,
    WEIGHTS_FILE,
    Accuracy,
    DataInfo,
    LayerInfo,
    ModelInfo,
    Run,
    RunInfo,
)

BUNDLE_FILE = "manifest.json"
SUMS_FILE = "SHA256SUMS"
MODEL_FILE = "model.onnx"
ORDERS_FILE = "orders.json"
GOLDEN_INPUT = "golden/input.npy"
GOLDEN_OUTPUT = "golden/output.npy"
CACHE_FOLDER = "cache/onnxruntime-tensorrt"
"""Of a bundle: what may come to be there after it was built, and is no part of it."""


@dataclass(frozen=True, kw_only=True)
class RunReference:
    """Where a bundle came from. path: as it was at build time; run_sha256: of its `run.json`."""

    path: str
    run_sha256: str


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
class CompactInfo:
    """What went with the dead channels of a graph.

    n_removed: output channels of layers.  n_inputs_dropped: inputs that layers no longer read.
    n_weights_before, n_weights_after: entries of all float initializers.
    """

    n_removed: int
    n_inputs_dropped: int
    n_weights_before: int
    n_weights_after: int
    layers: tuple[CompactedLayer, ...]


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
class PatternInfo:
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
    model: ModelInfo
    data: DataInfo | None
    run: RunReference
    precision: str
    targets: tuple[str, ...]
    opset: int
    ir_version: int
    input_name: str
    output_name: str
    density: float
    layers: tuple[LayerInfo, ...]
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
    files: dict[str, FileInfo]
    compacted: CompactInfo | None = None
    engines: tuple[EngineInfo, ...] = ()
    n_calibration: int = 0
    fitted: PatternInfo | None = None
    kind: Literal["bundle"] = "bundle"
    schema_version: int = SCHEMA_VERSION


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


def open_bundle(folder: Path) -> Bundle:
    """Read a bundle; `required_files` have to be listed, and every listed file whole. Raises UsageError or ArtefactError."""
    folder = Path(folder)
    info = read_bundle_info(folder)
    require_complete(folder, info)
    verify_files(folder, info.files)
    return Bundle(path=folder, info=info)
