"""`run.json`: a trained network with its sparsity facts."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from sparse_export.errors import ArtefactError
from sparse_export.files import json_bytes, write_json
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
from sparse_export.formats.listed import FileInfo, listed_graph, require_complete, verify_files
from sparse_export.formats.score import Score
from sparse_export.signature import Signature, class_signature

RUN_FILE = "run.json"
WEIGHTS_FILE = "model.safetensors"
MASKS_FILE = "masks.safetensors"
GRAPH_FILE = "model.onnx"


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """Where a network comes from.

    Attributes:
        name: a known name, `package.module:factory` or the name of an ONNX file; None for a torch network
            that was passed in memory and cannot be made again from a name.
        form: `torch` where the run holds weights for a network that its name makes; `onnx` where it holds the
            graph itself.
    """

    name: str | None
    form: Literal["torch", "onnx"] = "torch"


@dataclass(frozen=True, kw_only=True)
class CallInfo:
    """How forward of a torch network is called.

    Numbers, texts, truth values, None and lists stand for themselves, `{"input": NAME}` for a tensor,
    `{"tuple": [...]}` for a tuple, and `{"mapping": {...}}` for a mapping.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TaskInfo:
    """What a network is for.

    Attributes:
        name: of the task; `agreement` for one without labels, whose outputs are held against those of the
            dense network.
        labels: names of its classes, in the order of its outputs; empty where they have none.
    """

    name: str
    labels: tuple[str, ...] = ()


CLASSIFICATION = TaskInfo(name="classification")
AGREEMENT = TaskInfo(name="agreement")


@dataclass(frozen=True, kw_only=True)
class DenseInfo:
    """The dense network that a sparse one was made from.

    Attributes:
        sha256: of its file: the ONNX file, or the weights as a run holds them.
        path: of a run with it, which `build` makes the dense bundle of; None where none was left.
        test: its score on the test set.
    """

    sha256: Digest
    path: str | None
    test: Score | None = None


Interpolation = Literal["bilinear", "bicubic"]
"""How pictures are scaled."""


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """A data set, and how inputs are normalized: (x - mean) / std per channel, after scaling uint8 to 0..1.

    Attributes:
        name: of the data set.
        mean: one value for each channel.
        std: one value for each channel.
        n_train: number of training samples.
        n_validation: number of validation samples.
        n_test: number of test samples.
        test_sha256: of the raw test inputs and labels, so that another test set is noticed.
        crop_ratio: of pictures from a folder, the share of the scaled picture that the centre crop keeps
            along its shorter side.
        interpolation: of pictures from a folder, how they are scaled.
        classes: likewise, the class number of each folder; empty where they are numbered by their names.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    n_train: Count
    n_validation: Count
    n_test: Count
    test_sha256: str
    crop_ratio: Share = 1.0
    interpolation: Interpolation = "bilinear"
    classes: dict[str, Count] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """One weight.

    Attributes:
        name: of the parameter.
        shape: of the weight.
        n_weights: its entries.
        n_active: entries that are kept.
        masked: False for a layer that was left dense.
        pattern: the N:M pattern that it promises, or None.
        why_dense: where the network was trained to a pattern, why this layer was not.
    """

    name: str
    shape: tuple[Count, ...]
    n_weights: Positive
    n_active: Count
    masked: bool
    pattern: str | None = None
    why_dense: str | None = None

    @property
    def density(self) -> float:
        """Kept / total, from 0 to 1."""
        return self.n_active / self.n_weights


@dataclass(frozen=True, kw_only=True)
class SpeedInfo:
    """The measured speed of a run, and the paper's two estimates, which are no measurements.

    Attributes:
        step_ms: median over the epochs of the mean wall time of a training step in ms. Data, mask passes and
            mask updates are included (what happens once an epoch, divided by the epoch's number of steps),
            tests are not; other processes on the machine lengthen it.
        estimate_channels: dense time / the time that convolutions would take without their empty channels;
            None without convolutions. See `sparse_export.train.speed.estimate`.
        estimate_macs: likewise without any multiplication by zero.
        all_layers_estimate_channels: likewise with linear layers counted too, which the paper does not do.
        all_layers_estimate_macs: likewise without any multiplication by zero.
        n_moments: number of epochs that the estimates are means over.
        left_out: layers that could not be examined, with the reason.
    """

    step_ms: Amount
    estimate_channels: Amount | None
    estimate_macs: Amount | None
    all_layers_estimate_channels: Amount | None
    all_layers_estimate_macs: Amount | None
    n_moments: Count
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CostInfo:
    """What a training tried and had to multiply, by its masks: counted, not timed.

    Attributes:
        mean_density: active / masked weights, the mean over all training steps; None where a part of the past
            is not known.
        explored: weights that were active at some time / masked weights, the in-time over-parameterization
            rate; None likewise.
        macs: multiply-adds by the weights of linear layers and convolutions in all training steps, had zeros
            been left out, see `sparse_export.train.cost.training_macs`; None where they are not known.
        dense_macs: those of the dense baseline.
    """

    mean_density: Share | None
    explored: Share | None
    macs: Amount | None
    dense_macs: Amount | None

    @property
    def macs_share(self) -> float | None:
        """Multiply-adds of the training / those of the dense baseline."""
        return self.macs / self.dense_macs if self.macs is not None and self.dense_macs else None


@dataclass(frozen=True, kw_only=True)
class ProductInfo:
    """How training multiplied by a masked weight, where products without inactive weights were requested.

    Attributes:
        name: of the weight.
        by: `csr` or `2:4` for such products, `dense` otherwise.
        density: of the weight when this was decided.
        n_rows: rows of activations in a step; None where not known.
        dense_ms: median time of the three products of a step, timed in turn at the start; None where nothing
            was timed.
        csr_ms: likewise of the CSR products.
        reason: one clause that says why.
    """

    name: str
    by: Literal["csr", "2:4", "dense"]
    density: Share
    n_rows: Count | None
    dense_ms: Amount | None
    csr_ms: Amount | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """Content of `run.json`.

    Attributes:
        status: `running` until the last epoch is done; only with `complete` are `files` complete.
        method: that the run was trained with.
        model: the network.
        data: the data set, None for none.
        target_density: the density that was requested.
        density: kept / total over the masked layers; 1 for a dense run.
        n_active: kept weights of the masked layers.
        n_masked: weights of the masked layers.
        n_parameters: entries of all parameters.
        layers: the weights, masked or not.
        validation: score on the validation set.
        test: score on the test set.
        seed: of the run.
        n_threads: of torch.
        device: that it was trained on.
        epochs: that were trained.
        n_steps: training steps that were taken.
        seconds: wall time in training, over all resumptions.
        recipe: its settings.
        versions: of the libraries.
        command: that started it.
        created: time in ISO 8601.
        files: every file of the run but this one.
        n_processes: processes that trained together at the end.
        speed: None where it was not measured.
        cost: what the training cost by its masks; None where that is not known.
        products: one entry for each masked weight, where other products than dense ones were requested.
        signature: what the network takes and gives.
        task: what it is for.
        dense: the dense network that it was made from; None for one that was trained.
        call: how forward takes the inputs; None for one by position, several by the names that forward has.
        kept_epoch: where the best epoch was kept, its number from 1; None for the last one.
        digest: of this document.
    """

    status: Literal["running", "complete"]
    method: str
    model: ModelInfo
    data: DataInfo | None
    target_density: Share
    density: Share
    n_active: Count
    n_masked: Count
    n_parameters: Count
    layers: tuple[LayerInfo, ...]
    validation: Score | None
    test: Score | None
    seed: Count
    n_threads: Positive
    device: str
    epochs: Count
    n_steps: Count
    seconds: Amount
    recipe: dict[str, Any]
    versions: dict[str, str]
    command: tuple[str, ...]
    created: str
    files: dict[str, FileInfo]
    signature: Signature
    task: TaskInfo = CLASSIFICATION
    dense: DenseInfo | None = None
    call: CallInfo | None = None
    n_processes: Positive = 1
    speed: SpeedInfo | None = None
    cost: CostInfo | None = None
    products: tuple[ProductInfo, ...] = ()
    kept_epoch: Positive | None = None
    digest: str = field(default="", compare=False)
    kind: Literal["run"] = "run"
    schema_version: int = SEALED_VERSION
    description_file: ClassVar[str] = RUN_FILE

    @property
    def required_files(self) -> tuple[str, ...]:
        """The files that a finished run cannot do without; none while it is unfinished.

        They are weights and masks of a torch network, or the graph.
        """
        if self.status != "complete":
            return ()
        return (GRAPH_FILE,) if self.model.form == "onnx" else (WEIGHTS_FILE, MASKS_FILE)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run on disk.

    Attributes:
        path: its folder.
        info: its record.
        module: the network where it is still in memory, else None.
    """

    path: Path
    info: RunInfo
    module: Any = None

    @property
    def graph_path(self) -> Path:
        """The path of `model.onnx` of a run that holds a graph, which is checked each time.

        Raises:
            ArtefactError: `run.json` does not list it, or a file with its external data; or one of them is
                not the file that was written.
        """
        return listed_graph(self.path, self.info.files, GRAPH_FILE, described_by=RUN_FILE)


def run_digest(info: RunInfo) -> str:
    """Compute the hex SHA-256 of the `run.json` that `save_run_info` writes, before it is written.

    Args:
        info: the record.
    """
    return hashlib.sha256(json_bytes(sealed(info))).hexdigest()


def save_run_info(folder: Path, info: RunInfo) -> None:
    """Write `run.json`.

    Args:
        folder: of the run.
        info: the record.

    Raises:
        OutputError: it cannot be written.
    """
    write_json(folder / RUN_FILE, sealed(info))


def read_run_info(folder: Path) -> RunInfo:
    """Read `run.json`, of a finished run or not.

    Args:
        folder: of the run.

    Raises:
        UsageError: the folder does not exist.
        ArtefactError: it is no run, or its record is damaged.
    """
    file = description_path(Path(folder), RUN_FILE, "run", "sparse-export train")
    info: RunInfo = read_document(file, "run", RunInfo, newest=SEALED_VERSION, upgrade=upgraded_run)
    return info


def upgraded_run(document: dict[str, Any]) -> dict[str, Any]:
    """Make the present object of a run's document of version 1.

    Args:
        document: which told the shapes of a classifier in its model.
    """
    return document | fields_from_shapes(document["model"])


def fields_from_shapes(model: dict[str, Any], names: tuple[str, str] = ("input", "logits")) -> dict[str, Any]:
    """Make the fields that tell the shapes of a classifier, from the model of a document of version 1.

    Args:
        model: with `name`, `input_shape` and `n_classes`.
        names: of input and output.
    """
    signature = asdict(class_signature(tuple(model["input_shape"]), model["n_classes"], names=names))
    return {"model": {"name": model["name"]}, "signature": signature, "schema_version": SEALED_VERSION}


def open_run(folder: Path) -> Run:
    """Open a finished run: read its record, and check every file that it lists.

    Args:
        folder: of the run.

    Raises:
        UsageError: the folder does not exist.
        ArtefactError: it is no run or unfinished, weights or masks are not listed, or a listed file is not
            what was written.
    """
    folder = Path(folder)
    info = read_run_info(folder)
    if info.status != "complete":
        raise ArtefactError(
            f"The run in {folder} is not finished.",
            do=f"Go on with `sparse-export train --resume --out {folder}`.",
        )
    require_complete(folder, info)
    verify_files(folder, info.files)
    return Run(path=folder, info=info)
