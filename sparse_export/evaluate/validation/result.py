"""What validating a bundle found, as the value that is written and shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from sparse_export.evaluate.validation.table import table
from sparse_export.files import write_json
from sparse_export.formats.run import Accuracy

__all__ = ["AgainstDense", "BatchParity", "Parity", "RuntimeResult", "Validation", "write_results"]

RESULT_FILE = "validation.json"


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far the ONNX file is from PyTorch on the same samples.

    max_relative_difference: the largest absolute one by the spread of the logits that it is held against, their
    standard deviation.
    top1_agreement: share of samples with the same largest logit; None for outputs without two classes or more.
    """

    n_samples: int
    max_abs_difference: float
    max_relative_difference: float
    top1_agreement: float | None
    ok: bool


@dataclass(frozen=True, kw_only=True)
class BatchParity:
    """How far the ONNX file is from PyTorch on one batch of golden samples.

    max_abs_difference: None where onnxruntime cannot run a batch of that size.
    """

    batch: int
    max_abs_difference: float | None
    ok: bool


@dataclass(frozen=True, kw_only=True)
class AgainstDense:
    """Accuracy of the bundle minus that of a dense one on the same samples, in percentage points.

    accuracy: of the dense one, by onnxruntime on the CPU, whatever runs the bundle.
    low, high: paired 95 % interval.  mcnemar_p: of McNemar's exact test.
    """

    path: str
    onnx_sha256: str
    accuracy: Accuracy
    points: float
    low: float
    high: float
    mcnemar_p: float


@dataclass(frozen=True, kw_only=True)
class RuntimeResult:
    """What another runtime than onnxruntime on the CPU made of the bundle.

    name: as the session has it.  golden: against the stored outputs.  parity: against onnxruntime on the CPU, on the
    test set; None, as accuracy, where there is none.  drop_points: recorded minus accuracy.  against: what this runtime
    made of the bundle against the dense one.
    """

    name: str
    golden: Parity
    parity: Parity | None
    accuracy: Accuracy | None
    drop_points: float | None = None
    against: AgainstDense | None = None


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What validating a bundle found. A gate that failed is told by `check_gates`.

    accuracy: of the ONNX file; torch_accuracy: of the network of its run; recorded: what the run reported.
    The three are None where there is no test set, no run, or no record.  drop_points: recorded minus accuracy,
    in percentage points.  parity: None when the run was not there; run_missing then says what was looked for,
    and parity_ok rests on the golden pair alone.  batches: the same by batch size, empty without the run.  runtimes: the others that ran it; not_run: those that
    could not, and why.  max_drop: the gate, in percentage points, None for none.
    """

    bundle: str
    onnx_sha256: str
    data: str | None
    accuracy: Accuracy | None
    torch_accuracy: Accuracy | None
    recorded: Accuracy | None
    drop_points: float | None
    golden: Parity
    parity: Parity | None
    run_missing: str | None
    parity_ok: bool
    atol: float
    rtol: float
    max_drop: float | None
    against: AgainstDense | None
    versions: dict[str, str]
    created: str
    batches: tuple[BatchParity, ...] = ()
    runtimes: tuple[RuntimeResult, ...] = ()
    not_run: dict[str, str] = field(default_factory=dict)
    kind: str = "validation"
    schema_version: int = 1

    def __str__(self) -> str:
        return table(self)


def write_results(folder: str | Path, validation: Validation) -> Path:
    """Write `validation.json` into a folder, made when absent; gives its path. Raises OutputError."""
    path = Path(folder) / RESULT_FILE
    write_json(path, asdict(validation))
    return path
