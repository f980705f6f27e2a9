"""The training inputs that int8 and fp8 take their ranges from."""

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
    """Load training inputs for the precisions that need them.

    Args:
        info: of the run.
        precision: of the graph.
        n: number of samples.
        data_dir: where the data sets lie.

    Returns:
        Batches of at most 32 samples, (batch, *input_shape); none for a precision without calibration.

    Raises:
        UsageError: n is below the size of the golden pair, or the run names no data set.
        DataNotFound: the data set is not in data_dir.
    """
    if precision not in CALIBRATED:
        return []
    if n < GOLDEN_SAMPLES:
        raise UsageError(f"{n} samples are too few to calibrate on.", do=f"Use {GOLDEN_SAMPLES} at least.")
    if info.data is None:
        raise UsageError(
            f"The run names no data set, and {precision} is calibrated on training samples.",
            do="Build as fp16 or bf16, which need none.",
        )
    found = data.load_training_sample(info.data, info.signature.input_shape, n, data_dir)
    return [found[start : start + _BATCH] for start in range(0, len(found), _BATCH)]
