"""The inputs that int8 and fp8 take their ranges from."""

from __future__ import annotations

from pathlib import Path

from sparse_export.building.fold_preprocess import RawInput
from sparse_export.building.golden import GOLDEN_SAMPLES
from sparse_export.engines.options import Precision
from sparse_export.engines.precision import CALIBRATED
from sparse_export.errors import UsageError
from sparse_export.formats.run import RunInfo
from sparse_export.signature import Array
from sparse_export.tasks import data
from sparse_export.tasks.inputs import read_inputs
from sparse_export.tasks.named_data import calibration_of
from sparse_export.tasks.samples import BatchSamples, SingleInput

__all__ = ["calibration_batches", "require_calibration"]

_BATCH = 32


def require_calibration(info: RunInfo, precision: Precision, inputs: str | Path | None) -> None:
    """Check before the work that there is something to take ranges from.

    Args:
        info: of the run, as are the others of `calibration_batches`.

    Raises:
        UsageError: there are neither inputs nor a data set, and the precision needs some.
    """
    if precision in CALIBRATED and inputs is None and info.data is None:
        raise UsageError(
            f"The run names no data set, and {precision} is calibrated on real samples.",
            do="Give some by --inputs FILE.npz, or build as fp16 or bf16, which need none.",
        )


def calibration_batches(
    info: RunInfo,
    precision: Precision,
    n: int,
    data_dir: str | Path | None,
    inputs: str | Path | None = None,
    *,
    workers: int = 0,
    raw: RawInput | None = None,
) -> list[dict[str, Array]]:
    """Load inputs for the precisions that need them.

    Args:
        info: of the run.
        precision: of the graph.
        n: number of samples.
        data_dir: where the data sets lie.
        inputs: file or folder of inputs; None for training samples of the run's data set.
        workers: processes that decode pictures; 0 for threads.
        raw: what the graph takes in place of the network's input; None for that.

    Returns:
        Batches of at most 32 samples; none for a precision without calibration and no `inputs`.

    Raises:
        UsageError: n is below the size of the golden pair, there are neither inputs nor a data set, or inputs
            are normalized where raw pictures are wanted.
        DataNotFound: the data set is not in data_dir.
    """
    if precision not in CALIBRATED and inputs is None:
        return []
    if n < GOLDEN_SAMPLES:
        raise UsageError(f"{n} samples are too few to calibrate on.", do=f"Use {GOLDEN_SAMPLES} at least.")
    if inputs is not None:
        signature = info.signature if raw is None else raw.signature
        found = read_inputs(inputs, signature, n_samples=n, within=False)
        if raw is not None:
            raw.require_raw(found.batches, inputs)
        return list(BatchSamples(parts=found.batches, signature=signature).batches(_BATCH))
    require_calibration(info, precision, inputs)
    assert info.data is not None
    if not info.data.mean:
        found_batches = calibration_of(info.data.name, info.signature, data_dir, n)
        if found_batches is None:
            raise UsageError(
                f"{info.data.name} has no part to calibrate on, which {precision} needs.",
                do="Give some by --inputs FILE.npz.",
            )
        return list(BatchSamples(parts=found_batches, signature=info.signature).batches(_BATCH))
    sample = data.load_training_sample(
        info.data,
        info.signature.input_shape,
        n,
        data_dir,
        workers=workers,
        raw=None if raw is None else raw.dtype,
    )
    return list(SingleInput(name=info.signature.input_names[0], inputs=sample).batches(_BATCH))
