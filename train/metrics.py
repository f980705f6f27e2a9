"""Metrics of each epoch: `metrics.jsonl`, and TensorBoard events where it is installed."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sparse_export.files import output_error
from sparse_export.train.speed import LayerUse

METRICS_FILE = "metrics.jsonl"
EVENTS_FOLDER = "tensorboard"


@dataclass(frozen=True, kw_only=True)
class EpochMetrics:
    """One epoch.

    Args:
        epoch: from 1.
        step: optimizer steps done at its end.
        train_loss: mean over its steps.
        validation_score: of the validation part, as it is shown; None without one.
        validation: likewise, in words.
        learning_rate: of the last step.
        density: active / masked weights.
        layer_density: by parameter name, after the epoch's mask update.
        prune_rate: of that update; None when there was none.
        flip_rate: mask bits changed by that update / masked weights; None when there was none.
        masks_sha256: of the masks after it, see `distributed.masks_sha256`; None for a dense run.
        seconds: trained so far.
        step_ms: mean wall time of this epoch's steps, with the mask updates that are made every so many
            steps; None where it was resumed after the last of them.
        layer_use: what each layer had to do in a batch, see `sparse_export.train.speed`.
        update_ms: wall time of the mask update that is made once an epoch, which is not in step_ms; None
            where there was none.
        explored: weights that were active at some time so far / masked weights; None where a resumed state
            does not know it.
    """

    epoch: int
    step: int
    train_loss: float
    validation_score: float | None
    validation: str | None
    learning_rate: float
    density: float
    layer_density: dict[str, float]
    prune_rate: float | None
    flip_rate: float | None
    masks_sha256: str | None
    seconds: float
    step_ms: float | None
    layer_use: dict[str, LayerUse]
    update_ms: float | None = None
    explored: float | None = None


class MetricsLog:
    """Owns the open files. Reopening cuts off what was written after the state that training resumes from."""

    def __init__(self, run: Path, keep_bytes: int, epoch: int) -> None:
        self._path = run / METRICS_FILE
        try:
            self._file = self._path.open("ab")
            self._file.truncate(min(keep_bytes, self.size_bytes))
        except OSError as cause:
            raise output_error(self._path, cause) from cause
        self._events = _event_writer(run / EVENTS_FOLDER, epoch)

    def write(self, metrics: EpochMetrics) -> None:
        """Append one line and flush it. Raises OutputError."""
        try:
            self._file.write(json.dumps(asdict(metrics), allow_nan=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as cause:
            raise output_error(self._path, cause) from cause
        if self._events is not None:
            for name, value in _scalars(metrics).items():
                self._events.add_scalar(name, value, metrics.epoch)
            self._events.flush()

    @property
    def size_bytes(self) -> int:
        return self._file.seek(0, 2)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def _event_writer(folder: Path, epoch: int) -> Any:
    """A TensorBoard writer that hides later events of an earlier attempt; None without the library."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=epoch + 1)


def _scalars(metrics: EpochMetrics) -> dict[str, float]:
    values = {
        "loss/train": metrics.train_loss,
        "score/validation": metrics.validation_score,
        "learning_rate": metrics.learning_rate,
        "masks/density": metrics.density,
        "masks/prune_rate": metrics.prune_rate,
        "masks/flip_rate": metrics.flip_rate,
        "masks/explored": metrics.explored,
        **{f"layer_density/{name}": value for name, value in metrics.layer_density.items()},
    }
    return {name: value for name, value in values.items() if value is not None}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl` that can be read, in their order.

    Nothing is decided by them, so a damaged line, as a disk or an editor may leave one, is passed over.
    Raises OSError.
    """
    lines = []
    for line in (run / METRICS_FILE).read_bytes().split(b"\n")[:-1]:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            lines.append(found)
    return lines
