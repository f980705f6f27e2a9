"""`run.json`: a trained network with its sparsity facts."""

from __future__ import annotations

import hashlib
import operator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from sparse_export.errors import ArtefactError, UsageError
from sparse_export.files import json_bytes, write_json
from sparse_export.formats.document import SCHEMA_VERSION, description_path, read_document
from sparse_export.formats.listed import FileInfo, require_complete, verify_files

RUN_FILE = "run.json"
WEIGHTS_FILE = "model.safetensors"
MASKS_FILE = "masks.safetensors"


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """Which network: a known name or `package.module:factory`, and its shapes.

    name: None when the network was handed over in memory and cannot be made again from a name.
    input_shape: of one sample, without the batch axis.
    """

    name: str | None
    input_shape: tuple[int, ...]
    n_classes: int


@dataclass(frozen=True, kw_only=True)
class DataInfo:
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
class LayerInfo:
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
class SpeedInfo:
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
class ProductInfo:
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
    model: ModelInfo
    data: DataInfo | None
    target_density: float
    density: float
    n_active: int
    n_masked: int
    n_parameters: int
    layers: tuple[LayerInfo, ...]
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
    files: dict[str, FileInfo]
    n_processes: int = 1
    speed: SpeedInfo | None = None
    products: tuple[ProductInfo, ...] = ()
    kind: Literal["run"] = "run"
    schema_version: int = SCHEMA_VERSION
    description_file: ClassVar[str] = RUN_FILE

    @property
    def required_files(self) -> tuple[str, ...]:
        """The files that a finished run cannot do without, weights and masks; none while it is unfinished."""
        return (WEIGHTS_FILE, MASKS_FILE) if self.status == "complete" else ()


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run on disk. module: the live network when it is still in memory, else None."""

    path: Path
    info: RunInfo
    module: Any = None


def run_digest(info: RunInfo) -> str:
    """Hex SHA-256 of the `run.json` that `save_run_info` writes, known before it is written."""
    return hashlib.sha256(json_bytes(asdict(info))).hexdigest()


def save_run_info(folder: Path, info: RunInfo) -> None:
    """Write `run.json`."""
    write_json(folder / RUN_FILE, asdict(info))


def read_run_info(folder: Path) -> RunInfo:
    """Read `run.json`, of a finished run or not. Raises UsageError or ArtefactError."""
    file = description_path(Path(folder), RUN_FILE, "run", "sparse-export train")
    info: RunInfo = read_document(file, "run", RunInfo)
    return info


def open_run(folder: Path) -> Run:
    """Read a finished run; weights and masks have to be listed, and every listed file has to be whole.

    Raises UsageError or ArtefactError.
    """
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
