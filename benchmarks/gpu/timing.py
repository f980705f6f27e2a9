"""Times of calls in turns, as a case of the document has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from benchmarks.gpu.setting import Setting
from sparse_export.instruments.device import CudaStamps, stamps_for
from sparse_export.instruments.interleave import LatencyResult, measure_interleaved
from sparse_export.instruments.statistics import location, paired_ratio, resolution

Case = dict[str, Any]


def measured(
    setting: Setting, calls: Mapping[str, Callable[[], object]], batch: int
) -> dict[str, LatencyResult]:
    """Time calls in turns, on a card by CUDA events.

    Args:
        setting: of the session.
        calls: by name.
        batch: samples of one call.

    Returns:
        The times by the same names.
    """
    stamps = stamps_for(setting.device)
    return measure_interleaved(
        calls,
        batch=batch,
        rounds=setting.rounds,
        block_s=setting.block_s,
        warmup_limit_s=setting.warmup_limit_s,
        time_calls=stamps.time_calls if isinstance(stamps, CudaStamps) else None,
    )


def ratios(found: Mapping[str, LatencyResult], base: str = "dense", n_inside: int = 1) -> Case:
    """Compare the time of one call with that of every other.

    Args:
        found: times by name.
        base: name of the call that the others are compared with.
        n_inside: repetitions in one call; samples and medians are divided by it.

    Returns:
        Samples, medians and `base / other` with its interval; with `base again` the floor.
    """
    case: Case = {
        "samples_ms": {name: [ms / n_inside for ms in one.samples_ms] for name, one in found.items()}
    }
    case["steady"] = all(one.steady for one in found.values())
    case["ms"] = {name: location(samples).estimate for name, samples in case["samples_ms"].items()}
    for name, one in found.items():
        if name != base:
            case[f"{base} / {name}"] = asdict(paired_ratio(found[base].samples_ms, one.samples_ms))
    if f"{base} again" in found:
        case["floor"] = resolution(paired_ratio(found[base].samples_ms, found[f"{base} again"].samples_ms))
    return case
