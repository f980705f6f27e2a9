"""The training inputs that a graph of small numbers takes its ranges from."""

from __future__ import annotations

from pathlib import Path

from sparse_export.building.golden import GOLDEN_SAMPLES, Array
from sparse_export.engines.options import Precision
from sparse_export.engines.precision import CALIBRATED
from sparse_export.errors import UsageError
from sparse_export.formats.run import RunInfo
from sparse_export.tasks import data

__all__ = ["calibration_batches"]

_BATCH = 32


def calibration_batches(
    info: RunInfo, precision: Precision, n: int, data_dir: str | Path | None
) -> list[Array]:
    """Batches of n training inputs, for the precisions that need them, else none.

    Raises UsageError for fewer than the golden pair needs or a run without data, and DataNotFound.
    """
    if precision not in CALIBRATED:
        return []
    if n < GOLDEN_SAMPLES:
        raise UsageError(
            f"{n} samples were given to calibrate on.", expected=f"At least {GOLDEN_SAMPLES} were expected."
        )
    if info.data is None:
        raise UsageError(
            f"The run names no data set, and {precision} is calibrated on training samples.",
            expected="A run with a data set was expected.",
            do="Build as fp16 or bf16, which need none.",
        )
    found = data.load_training_sample(info.data, info.model.input_shape, n, data_dir)
    return [found[start : start + _BATCH] for start in range(0, len(found), _BATCH)]
