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
    """Interleaved times, the device's own on a card."""
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
    """base / each of the others, with intervals, and the samples, of one of the n_inside things that a call
    does.
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
