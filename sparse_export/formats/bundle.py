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
"""A folder that may appear in a bundle after it was built, and is no part of it."""


@dataclass(frozen=True, kw_only=True)
class RunReference:
    """The run that a bundle was built from.

    Attributes:
        path: of its folder, at build time.
        run_sha256: of its `run.json`.
    """

    path: str
    run_sha256: str


@dataclass(frozen=True, kw_only=True)
class CompactedLayer:
    """A layer of a compacted graph.

    Attributes:
        node: of the graph.
        weight: name of the stored tensor.
        before: its shape before dead channels were removed.
        after: its shape afterwards.
        why: what kept it from losing more.
    """

    node: str
    weight: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    why: str


@dataclass(frozen=True, kw_only=True)
class CompactInfo:
    """What was removed with the dead channels of a graph.

    Attributes:
        n_removed: output channels of layers that were removed.
        n_inputs_dropped: inputs that layers no longer read.
        n_weights_before: entries of all float initializers before.
        n_weights_after: likewise afterwards.
        layers: those whose shape changed.
    """

    n_removed: int
    n_inputs_dropped: int
    n_weights_before: int
    n_weights_after: int
    layers: tuple[CompactedLayer, ...]


PatternMethod = Literal["as trained", "permuted", "gathered", "dense"]


@dataclass(frozen=True, kw_only=True)
class PatternLayer:
    """How a weight was made to satisfy a pattern, if it was.

    Attributes:
        name: of the weight.
        shape: of the weight.
        density: nonzeros / weights, before.
        road: the method by which it satisfies the pattern; `dense` for one that was left as it was.
        n_groups: groups of M; None where M does not divide the axis.
        groups_over_before: groups with more than N nonzeros, before; None without groups.
        groups_over_after: likewise in the order that the layer has now, or for a dense layer the best order
            found; None where no order was searched for.
        cut_needed: share of sum |w| that the pattern would drop in that order, from 0 to 1; None likewise.
        cut: share of sum |w| that was dropped.
        n_cut: number of weights that were dropped.
        reason: why it stayed dense; empty otherwise.
    """

    name: str
    shape: tuple[int, ...]
    density: float
    road: PatternMethod
    n_groups: int | None
    groups_over_before: int | None
    groups_over_after: int | None
    cut_needed: float | None
    cut: float
    n_cut: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class PatternInfo:
    """How a trained network was made to satisfy a pattern.

    Attributes:
        pattern: such as `2:4`.
        max_cut: share of sum |w| that a layer was allowed to lose.
        gather: which layers might get their input in an order of their own.
        layers: in the run's order.
        difference: the largest between the network's outputs before and after its channels were permuted,
            over the largest output, in float64; weights were dropped only afterwards.
        accuracy_before: of the run's network, by PyTorch.
        accuracy_after: of the ONNX file, by onnxruntime, on the same samples.
        n_changed: predictions that changed.
        not_measured: why these three are None.
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

    Attributes:
        method: that the run was trained with.
        model: the network.
        data: the run's data set, None for none.
        run: where the bundle came from.
        precision: of the graph, whose inputs and outputs are float32.
        targets: `onnx`, and those of the engines.
        opset: of the graph, domain `ai.onnx`.
        ir_version: of the ONNX file.
        input_name: of the graph.
        output_name: of the graph.
        density: kept / total over the masked layers, after weights were dropped for a pattern.
        layers: of the run, with the patterns that they promise now.
        n_parameters: entries of all float initializers of the graph.
        n_nonzero: the nonzero ones of these.
        macs: multiply-accumulates by weights for one sample; None where shapes are unknown.
        nonzero_macs: likewise without zero weights.
        accuracy: of the run on its test set, before anything was dropped.
        atol: absolute tolerance of the golden pair.
        rtol: its tolerance as a share of the spread of the logits.
        versions: of the libraries that built it.
        command: that built it.
        created: time in ISO 8601.
        files: every file of the bundle but this one.
        compacted: None for a graph that has all its channels.
        engines: one for each target other than `onnx`.
        n_calibration: training samples that int8 and fp8 took their ranges from.
        fitted: None where no pattern was requested.
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

        They are the graph, the golden pair, the table of layers, the orders of a bundle that was made to
        satisfy a pattern, and what its engines name.
        """
        names = [MODEL_FILE, GOLDEN_INPUT, GOLDEN_OUTPUT, LAYERS_FILE]
        names += [ORDERS_FILE] if self.fitted is not None else []
        for engine in self.engines:
            names += [engine.file] if engine.timing_cache is None else [engine.file, engine.timing_cache]
        return tuple(dict.fromkeys(names))


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle on disk.

    Attributes:
        path: its folder.
        info: its manifest.
    """

    path: Path
    info: BundleInfo

    @property
    def onnx_path(self) -> Path:
        """The path of `model.onnx`, which is checked each time.

        Raises:
            ArtefactError: the manifest does not list it, or a file with its external data; or one of them is
                not the file that was written.
        """
        return listed_graph(self.path, self.info.files, MODEL_FILE, described_by=BUNDLE_FILE)


def save_bundle_info(folder: Path, info: BundleInfo) -> None:
    """Write `manifest.json`, then `SHA256SUMS` over it and every file that it lists.

    Args:
        folder: of the bundle.
        info: the manifest.

    Raises:
        OutputError: it cannot be written.
    """
    write_json(folder / BUNDLE_FILE, asdict(info))
    sums = {name: file.sha256 for name, file in info.files.items()}
    sums[BUNDLE_FILE] = sha256_file(folder / BUNDLE_FILE)
    lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
    (folder / SUMS_FILE).write_text("".join(lines))


def read_bundle_info(folder: Path) -> BundleInfo:
    """Read `manifest.json`; the other files are not looked at.

    Args:
        folder: of the bundle.

    Raises:
        UsageError: the folder does not exist.
        ArtefactError: it is no bundle, or its manifest is damaged.
    """
    file = description_path(Path(folder), BUNDLE_FILE, "bundle", "sparse-export build")
    info: BundleInfo = read_document(file, "bundle", BundleInfo)
    return info


def open_bundle(folder: Path) -> Bundle:
    """Open a bundle: read its manifest, and check every file that it lists.

    Args:
        folder: of the bundle.

    Raises:
        UsageError: the folder does not exist.
        ArtefactError: it is no bundle, a required file is not listed, or a listed file is not what was
            written.
    """
    folder = Path(folder)
    info = read_bundle_info(folder)
    require_complete(folder, info)
    verify_files(folder, info.files)
    return Bundle(path=folder, info=info)
