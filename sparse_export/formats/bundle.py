"""`manifest.json`: a bundle, what it holds and where it came from."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Interval

from sparse_export.errors import ArtefactError
from sparse_export.files import sha256_file, write_json
from sparse_export.formats.document import (
    SEALED_VERSION,
    Amount,
    Count,
    Digest,
    Positive,
    Share,
    description_path,
    read_document,
    sealed,
)
from sparse_export.formats.engines import EngineInfo, upgraded_engine
from sparse_export.formats.layers import LAYERS_FILE
from sparse_export.formats.listed import (
    FileInfo,
    copy_listed_graph,
    listed_graph,
    require_complete,
    verify_files,
)
from sparse_export.formats.preparation import FoldedInfo, PreprocessInfo
from sparse_export.formats.run import (
    CLASSIFICATION,
    DataInfo,
    DenseInfo,
    LayerInfo,
    ModelInfo,
    TaskInfo,
    fields_from_shapes,
)
from sparse_export.formats.score import Score
from sparse_export.signature import Signature

BUNDLE_FILE = "manifest.json"
SUMS_FILE = "SHA256SUMS"
MODEL_FILE = "model.onnx"
ORDERS_FILE = "orders.json"
ENGINE_MODEL_FILE = "model-engine.onnx"
"""The graph that engines of int8 and fp8 are built of."""
GOLDEN_INPUT = "golden/input.npy"
GOLDEN_OUTPUT = "golden/output.npy"
CACHE_FOLDER = "cache/onnxruntime-tensorrt"
"""A folder that may appear in a bundle after it was built, and is no part of it."""

Atol = Annotated[float, Interval(ge=0.0, le=1e-3)]
Rtol = Annotated[float, Interval(ge=0.0, le=1.0)]
"""Of no precision is more allowed."""


@dataclass(frozen=True, kw_only=True)
class RunReference:
    """The run that a bundle was built from.

    Attributes:
        path: of its folder, at build time.
        run_sha256: of its `run.json`.
    """

    path: str
    run_sha256: Digest


@dataclass(frozen=True, kw_only=True)
class GoldenInfo:
    """Files of the golden pair: inputs, and what every runtime has to give for them.

    Attributes:
        inputs: a `.npy` file for each input, by its name.
        outputs: likewise for each output of fixed size.
        inner: likewise for values that are no outputs of the network: those inside the graph that stand for
            outputs whose length depends on the data, the last values of fixed size before them; and outputs
            that a step behind the network added.
    """

    inputs: dict[str, str]
    outputs: dict[str, str]
    inner: dict[str, str]

    @property
    def files(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.inputs.values(), *self.outputs.values(), *self.inner.values())


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
    before: tuple[Count, ...]
    after: tuple[Count, ...]
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

    n_removed: Count
    n_inputs_dropped: Count
    n_weights_before: Count
    n_weights_after: Count
    layers: tuple[CompactedLayer, ...]


@dataclass(frozen=True, kw_only=True)
class EngineGraphInfo:
    """The graph that engines of int8 and fp8 are built of; `model.onnx` is for onnxruntime's kernels.

    Attributes:
        file: of the graph.
        ranges: how the ranges of its values were taken: `max`, `percentile` or `entropy`.
        migrated: were scales of channels moved into the weights behind normalizations?
        rms: by each way that was tried, `migrated` being the best ranges with scales moved: root mean square
            of the error on samples that ranges were taken from, by the spread of the output where it is
            largest.
        n_products: products of the graph, those without weights too.
        n_quantized: those that read and write quantized values.
    """

    file: str
    ranges: str
    migrated: bool
    rms: dict[str, Amount]
    n_products: Count
    n_quantized: Count


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
    shape: tuple[Count, ...]
    density: Share
    road: PatternMethod
    n_groups: Count | None
    groups_over_before: Count | None
    groups_over_after: Count | None
    cut_needed: Share | None
    cut: Share
    n_cut: Count
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
            over the largest output, in float64, of a graph in float32; weights were dropped only afterwards.
        score_before: of the run's network, by PyTorch.
        score_after: of the ONNX file, by onnxruntime, on the same samples.
        n_changed: predictions that changed, of a classifier.
        not_measured: why these three are None.
    """

    pattern: str
    max_cut: Share
    gather: Literal["none", "input", "any"]
    layers: tuple[PatternLayer, ...]
    difference: Amount
    score_before: Score | None
    score_after: Score | None
    n_changed: Count | None
    not_measured: str | None


@dataclass(frozen=True, kw_only=True)
class BundleInfo:
    """Content of `manifest.json`.

    Attributes:
        method: that the run was trained with.
        model: the network.
        data: the run's data set, None for none.
        run: where the bundle came from.
        signature: what the network takes and gives, and what was appended to the graph behind it.
        task: what it is for.
        dense: the dense network that the run was made from, if the run says so.
        golden: files of the golden pair.
        precision: of the graph; the types of its inputs and outputs are those of the signature.
        targets: `onnx`, and those of the engines.
        opset: of the graph, domain `ai.onnx`.
        ir_version: of the ONNX file.
        density: kept / total over the masked layers, after weights were dropped for a pattern.
        layers: of the run, with the patterns that they promise now.
        n_parameters: entries of all float initializers of the graph.
        n_nonzero: the nonzero ones of these.
        macs: multiply-accumulates by weights for one sample; None where shapes are unknown.
        nonzero_macs: likewise without zero weights.
        score: of the run on its test set, before anything was dropped.
        atol: absolute tolerance of the golden pair.
        rtol: its tolerance as a share of the spread of an output.
        rms: likewise of the root mean square of the differences of an output; None in bundles that were built
            before there was one.
        versions: of the libraries that built it.
        command: that built it.
        created: time in ISO 8601.
        files: every file of the bundle but this one.
        compacted: None for a graph that has all its channels.
        engines: one for each target other than `onnx`.
        n_calibration: training samples that int8 and fp8 took their ranges from.
        fitted: None where no pattern was requested.
        postprocess: the steps that were appended, like `softmax` and `topk:5`.
        preprocess: the graph that makes the network's input; None for none.
        folded: how the graph normalizes raw samples; None where it takes normalized ones.
        engine_graph: the graph that engines are built of, where that is another one than `model.onnx`.
        digest: of this document.
    """

    method: str
    model: ModelInfo
    signature: Signature
    data: DataInfo | None
    run: RunReference
    precision: str
    targets: tuple[str, ...]
    opset: Positive
    ir_version: Positive
    golden: GoldenInfo
    density: Share
    layers: tuple[LayerInfo, ...]
    n_parameters: Count
    n_nonzero: Count
    macs: Count | None
    nonzero_macs: Count | None
    score: Score | None
    atol: Atol
    rtol: Rtol
    versions: dict[str, str]
    command: tuple[str, ...]
    created: str
    files: dict[str, FileInfo]
    task: TaskInfo = CLASSIFICATION
    dense: DenseInfo | None = None
    compacted: CompactInfo | None = None
    engines: tuple[EngineInfo, ...] = ()
    rms: Rtol | None = None
    n_calibration: Count = 0
    fitted: PatternInfo | None = None
    postprocess: tuple[str, ...] = ()
    preprocess: PreprocessInfo | None = None
    folded: FoldedInfo | None = None
    engine_graph: EngineGraphInfo | None = None
    digest: str = field(default="", compare=False)
    kind: Literal["bundle"] = "bundle"
    schema_version: int = SEALED_VERSION
    description_file: ClassVar[str] = BUNDLE_FILE

    @property
    def reference_score(self) -> Score | None:
        """What losses count from: the score of the run's dense network where it has one, else its own."""
        dense = None if self.dense is None else self.dense.test
        return self.score if dense is None else dense

    @property
    def network_signature(self) -> Signature:
        """What the network of the run takes and gives, before anything was folded or appended."""
        inputs = self.signature.inputs
        if self.folded is not None:
            inputs = tuple(replace(one, dtype="float32") for one in inputs)
        return replace(self.signature, inputs=inputs, appended=())

    @property
    def inner_values(self) -> tuple[str, ...]:
        """The values inside the graph that stand for outputs whose length depends on the data."""
        return tuple(name for name in self.golden.inner if name not in self.signature.whole.output_names)

    @property
    def class_scores(self) -> tuple[str, ...]:
        """The outputs that may hold a score for each class: the first, and appended probabilities."""
        has_probabilities = {"softmax", "sigmoid"} & set(self.postprocess)
        appended = self.signature.appended[:1] if has_probabilities else ()
        return tuple(one.name for one in (self.signature.outputs[0], *appended))

    @property
    def required_files(self) -> tuple[str, ...]:
        """The files that a bundle cannot do without; every release has listed them.

        They are the graph, the golden pair, the table of layers, the orders of a bundle that was made to
        satisfy a pattern, and what its engines name.
        """
        names = [MODEL_FILE, *self.golden.files, LAYERS_FILE]
        names += [ORDERS_FILE] if self.fitted is not None else []
        names += [] if self.preprocess is None else self.preprocess.files
        names += [] if self.engine_graph is None else [self.engine_graph.file]
        for engine in self.engines:
            names += [engine.file] if engine.timing_cache is None else [engine.file, engine.timing_cache]
        return tuple(dict.fromkeys(names))


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle on disk.

    Attributes:
        path: its folder; without links on the way to it where it was opened by `open_bundle`.
        info: its manifest.
        read_sha256: SHA-256 of the bytes that `info` was read from, where that is known.
    """

    path: Path
    info: BundleInfo
    read_sha256: str | None = field(default=None, compare=False)

    @property
    def manifest_sha256(self) -> str:
        """SHA-256 of `manifest.json`, which identifies the bundle.

        Raises:
            OSError: it cannot be read.
        """
        return self.read_sha256 or sha256_file(self.path / BUNDLE_FILE)

    @property
    def onnx_path(self) -> Path:
        """The path of `model.onnx`, which is checked each time.

        Raises:
            ArtefactError: the manifest does not list it, or a file with its external data; or one of them is
                not the file that was written.
        """
        return self.graph_file(MODEL_FILE)

    def graph_file(self, name: str) -> Path:
        """The path of an ONNX file, which is checked each time.

        Args:
            name: as the manifest lists the file.

        Raises:
            ArtefactError: as `onnx_path`.
        """
        return listed_graph(self.path, self.info.files, name, described_by=BUNDLE_FILE)

    def copy_graph(self, name: str, target: Path) -> dict[str, str]:
        """Copy an ONNX file and the files of its external data; what is written is what was checked.

        Args:
            name: as the manifest lists the file.
            target: the new file. Those of its data get the names that they have, beside it.

        Returns:
            SHA-256 of each file by its path relative to the folder of the new file.

        Raises:
            ArtefactError: as `onnx_path`.
            OutputError: a file cannot be written.
        """
        return copy_listed_graph(self.path, self.info.files, name, target, described_by=BUNDLE_FILE)


def save_bundle_info(folder: Path, info: BundleInfo) -> None:
    """Write `manifest.json`, then `SHA256SUMS` over it and every file that it lists.

    Args:
        folder: of the bundle.
        info: the manifest.

    Raises:
        OutputError: it cannot be written.
    """
    write_json(folder / BUNDLE_FILE, sealed(info))
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
    return _info_from(file, None)


def _info_from(file: Path, content: bytes | None) -> BundleInfo:
    info: BundleInfo = read_document(
        file, "bundle", BundleInfo, newest=SEALED_VERSION, content=content, upgrade=upgraded_bundle
    )
    return info


def upgraded_bundle(document: dict[str, Any]) -> dict[str, Any]:
    """Make the present object of a manifest of version 1.

    Args:
        document: which named the one input and the one output of a classifier.
    """
    ends = document["input_name"], document["output_name"]
    dropped = ("input_name", "output_name", "accuracy")
    kept = {key: value for key, value in document.items() if key not in dropped}
    kept["score"] = document.get("accuracy")
    if isinstance(document.get("fitted"), dict):
        kept["fitted"] = {key.replace("accuracy_", "score_"): one for key, one in document["fitted"].items()}
    golden = {
        "inputs": {ends[0]: GOLDEN_INPUT},
        "outputs": {ends[1]: GOLDEN_OUTPUT},
        "inner": {},
    }
    engines = [upgraded_engine(one) for one in document.get("engines", ())]
    return kept | fields_from_shapes(document["model"], ends) | {"golden": golden, "engines": engines}


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
    file = description_path(folder, BUNDLE_FILE, "bundle", "sparse-export build")
    real = Path(os.path.realpath(folder))
    if real != folder.absolute():
        folder, file = real, real / BUNDLE_FILE  # a link that is changed meanwhile changes nothing
    try:
        content = file.read_bytes()
    except OSError as cause:
        raise ArtefactError(
            f"{file} cannot be read: {cause.strerror or cause}.",
            do="Look at its permissions, or copy the folder again.",
        ) from cause
    info = _info_from(file, content)
    require_complete(folder, info)
    verify_files(folder, info.files)
    return Bundle(path=folder, info=info, read_sha256=hashlib.sha256(content).hexdigest())
