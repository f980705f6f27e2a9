"""`manifest.json`: a bundle, what it holds and where it came from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

from sparse_export.files import sha256_file, write_json
from sparse_export.formats.document import SCHEMA_VERSION, description_path, read_document
from sparse_export.formats.engines import EngineInfo
from sparse_export.formats.layers import LAYERS_FILE
from sparse_export.formats.listed import (
    FileInfo,
    listed_graph,
    require_complete,
    verify_files,
)
from sparse_export.formats.run import (
    Accuracy,
    DataInfo,
    LayerInfo,
    ModelInfo,
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
    description_file: ClassVar[str] = BUNDLE_FILE

    @property
    def required_files(self) -> tuple[str, ...]:
        """The files that a bundle cannot do without; every release has listed them.

        They are the graph, the golden pair, the table of layers, the orders of a bundle that was made to satisfy a
        pattern, and what its engines name.
        """
        names = [MODEL_FILE, GOLDEN_INPUT, GOLDEN_OUTPUT, LAYERS_FILE]
        names += [ORDERS_FILE] if self.fitted is not None else []
        for engine in self.engines:
            names += [engine.file] if engine.timing_cache is None else [engine.file, engine.timing_cache]
        return tuple(dict.fromkeys(names))


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


def save_bundle_info(folder: Path, info: BundleInfo) -> None:
    """Write `manifest.json`, then `SHA256SUMS` over it and every file that it lists."""
    write_json(folder / BUNDLE_FILE, asdict(info))
    sums = {name: fact.sha256 for name, fact in info.files.items()}
    sums[BUNDLE_FILE] = sha256_file(folder / BUNDLE_FILE)
    lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
    (folder / SUMS_FILE).write_text("".join(lines))


def read_bundle_info(folder: Path) -> BundleInfo:
    """Read `manifest.json`; the other files are not looked at. Raises UsageError or ArtefactError."""
    file = description_path(Path(folder), BUNDLE_FILE, "bundle", "sparse-export build")
    info: BundleInfo = read_document(file, "bundle", BundleInfo)
    return info


def open_bundle(folder: Path) -> Bundle:
    """Read a bundle; its required files have to be listed, and every listed
    file has to be whole. Raises UsageError or ArtefactError."""
    folder = Path(folder)
    info = read_bundle_info(folder)
    require_complete(folder, info)
    verify_files(folder, info.files)
    return Bundle(path=folder, info=info)
