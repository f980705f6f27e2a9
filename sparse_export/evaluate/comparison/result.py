"""What a comparison found, as the value that is written and shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from sparse_export.errors import GateFailed, SpeedupNotReached
from sparse_export.evaluate.comparison.table import table
from sparse_export.files import write_json
from sparse_export.formats.run import Accuracy
from sparse_export.instruments.conditions import Timed
from sparse_export.instruments.interleave import LatencyResult
from sparse_export.instruments.outcome import Outcome
from sparse_export.instruments.statistics import AccuracyDifference, Ratio

__all__ = ["Comparison", "LatencyComparison", "Side", "check_gates", "write_results"]

RESULT_FILE = "comparison.json"


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two bundles.

    precision: that the graph computes in.  size_bytes: of model.onnx and its external data.  accuracy: None when nobody measured it.  n_parameters,
    n_nonzero: over the float initializers.  macs, nonzero_macs: for one sample; None when not known.
    """

    path: str
    model: str | None
    method: str
    density: float
    precision: str
    size_bytes: int
    n_parameters: int
    n_nonzero: int
    macs: int | None
    nonzero_macs: int | None
    accuracy: Accuracy | None


@dataclass(frozen=True, kw_only=True)
class LatencyComparison:
    """Times at one batch size.

    ratio: dense / sparse, above 1 when sparse is faster.  control: dense / the same dense file loaded again,
    which differs from 1 only by what this machine cannot resolve.  floor: the farthest end of the control's
    interval from 1, as a ratio above 1; outcome: of ratio's interval against floor.
    verdict: the outcome in words.
    on_device: the same three of the work on the device alone, by CUDA events, `dense`, `dense again` and `sparse`, with
    device_ratio and device_control; empty and None where the runtime cannot say. No outcome rests on these.
    """

    batch: int
    dense: LatencyResult
    dense_again: LatencyResult
    sparse: LatencyResult
    ratio: Ratio
    control: Ratio
    floor: float
    outcome: Outcome
    verdict: str
    on_device: dict[str, LatencyResult] = field(default_factory=dict)
    device_ratio: Ratio | None = None
    device_control: Ratio | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison(Timed):
    """Everything that `compare` found; `str()` gives the table for people.

    accuracy_source: `measured` here with the very files that were timed, `recorded` in the manifests, or
    None.  difference: sparse minus dense on the same samples, only when measured.
    accuracy_drop_points: dense minus sparse, in percentage points.
    runtime: as its sessions name themselves.  passed_over: by name, runtimes that would have been better, and why
    they could not run both.  cores: that its threads were held to; () where they had every usable one.  cards: what
    NVML said of cards meanwhile.
    gate_failed, speedup_missed: what to tell when `max_drop_points` or `required_speedup` was not kept.
    """

    dense: Side
    sparse: Side
    accuracy_source: Literal["measured", "recorded"] | None
    accuracy_drop_points: float | None
    difference: AccuracyDifference | None
    latency: tuple[LatencyComparison, ...]
    max_drop_points: float | None
    required_speedup: float | None
    gate_failed: str | None
    speedup_missed: str | None
    runtime: str
    passed_over: dict[str, str]

    def __str__(self) -> str:
        return table(self)


def check_gates(comparison: Comparison) -> None:
    """Raise GateFailed, or else SpeedupNotReached, when a requirement given to `compare` was not kept."""
    if comparison.gate_failed:
        raise GateFailed(
            comparison.gate_failed,
            expected=f"At most {comparison.max_drop_points:g} points were allowed.",
            do="Train longer or at a higher density, or allow a larger drop.",
        )
    if comparison.speedup_missed:
        raise SpeedupNotReached(
            comparison.speedup_missed,
            expected=f"At least {comparison.required_speedup:g}x was required, at the lower end of the interval.",
            do="Read the verdicts: zeros alone do not make this runtime faster.",
        )


def write_results(folder: Path, comparison: Comparison) -> Path:
    """Write `comparison.json`, raw samples included, into the folder; return its path. Raises OutputError."""
    path = Path(folder) / RESULT_FILE
    write_json(path, {"kind": "comparison", **asdict(comparison)})
    return path
