"""The tolerance within which two outputs of a network count as the same.

Of floats it is relative to their spread, not to their size: adding 1,000 to all of them changes no
prediction, and would hide an error if it were relative to the largest. Of integers it is a share that may
differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparse_export.signature import FLOATS

__all__ = ["OutputDifference", "differences", "spread"]

_Array = np.ndarray[tuple[Any, ...], np.dtype[Any]]


@dataclass(frozen=True, kw_only=True)
class OutputDifference:
    """How far one output is from what it should be.

    Attributes:
        name: of the output.
        max_abs_difference: the largest; of integers and truth values None.
        max_relative_difference: likewise by the spread; 0 where there is no spread.
        rms_difference: root mean square of the differences by the spread; 0 where there is no spread, None of
            integers and truth values.
        equal_share: of integers and truth values the share that is equal; of floats None.
        ok: within tolerance.
    """

    name: str
    max_abs_difference: float | None
    max_relative_difference: float | None
    rms_difference: float | None
    equal_share: float | None
    ok: bool


_PEAK_SHARE = 0.1  # values as normal as logits never lie ten standard deviations from their mean


def spread(wanted: _Array) -> float:
    """Compute the standard deviation of all values of an output about the mean of their own sample.

    It is not their range, which grows with the number of samples: a test set would then have a larger
    tolerance than the eight golden samples. Where nearly all values of a sample are the same, as those of a
    softmax over thousands of classes, the deviation says nothing of the few that count; then it is a tenth of
    how far the farthest value of a sample lies from its mean, on average.

    Args:
        wanted: (samples, ...). With one value a sample, the deviation is about the mean of all samples.

    Returns:
        The larger of the two; 0 for no samples.
    """
    if not wanted.size:
        return 0.0
    rows = wanted.astype(np.float64).reshape(len(wanted) if wanted.ndim else 1, -1)
    about = rows.mean(1, keepdims=True) if rows.shape[1] > 1 else rows.mean()
    rows = rows - about
    return float(max(np.std(rows), _PEAK_SHARE * np.abs(rows).max(1).mean()))


def differences(
    found: Mapping[str, _Array],
    wanted: Mapping[str, _Array],
    *,
    atol: float,
    rtol: float,
    rms: float | None = None,
    spread_of: Mapping[str, _Array] | None = None,
) -> tuple[OutputDifference, ...]:
    """Compare the outputs of a network, one by one.

    Args:
        found: by name; those that are not wanted are not looked at.
        wanted: by name.
        atol: absolute tolerance of floats.
        rtol: of floats the tolerance as a share of their spread; of integers and truth values the share that
            may differ.
        rms: largest root mean square of the differences of floats, as a share of their spread; `atol` is
            added. The largest difference of an output of many values lies far out, and says little
            of the others. None for no limit.
        spread_of: outputs by name whose spread counts; None for those that are wanted.

    Returns:
        One entry for each output that is wanted. Another shape or a missing output is never within
        tolerance.
    """
    whole = wanted if spread_of is None else spread_of
    return tuple(
        _difference(name, found.get(name), one, whole[name], atol, rtol, rms) for name, one in wanted.items()
    )


def _difference(
    name: str,
    found: _Array | None,
    wanted: _Array,
    whole: _Array,
    atol: float,
    rtol: float,
    rms: float | None,
) -> OutputDifference:
    is_float = wanted.dtype.name in FLOATS
    if found is None or found.shape != wanted.shape:
        off = float("inf")
        return OutputDifference(
            name=name,
            max_abs_difference=off if is_float else None,
            max_relative_difference=off if is_float else None,
            rms_difference=off if is_float else None,
            equal_share=None if is_float else 0.0,
            ok=False,
        )
    if not is_float:
        share = float((found == wanted).mean()) if wanted.size else 1.0
        return OutputDifference(
            name=name,
            max_abs_difference=None,
            max_relative_difference=None,
            rms_difference=None,
            equal_share=share,
            ok=1.0 - share <= rtol,
        )
    off_by = np.abs(found.astype(np.float64) - wanted.astype(np.float64))
    largest = float(off_by.max(initial=0.0))
    typical = float(np.sqrt(np.mean(np.square(off_by)))) if off_by.size else 0.0
    size = spread(whole)
    return OutputDifference(
        name=name,
        max_abs_difference=largest,
        max_relative_difference=largest / size if size else 0.0,
        rms_difference=typical / size if size else 0.0,
        equal_share=None,
        # never for NaN
        ok=largest <= atol + rtol * size and (rms is None or typical <= atol + rms * size),
    )
