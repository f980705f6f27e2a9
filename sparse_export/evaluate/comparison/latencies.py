"""Dense and sparse sessions timed against each other at one batch size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from sparse_export.engines.loadable import engine_of
from sparse_export.engines.tensorrt_import import TARGETS
from sparse_export.evaluate.bench.sessions import Timing
from sparse_export.evaluate.comparison.open import Opened
from sparse_export.evaluate.comparison.result import LatencyComparison
from sparse_export.evaluate.comparison.verdict import judge
from sparse_export.formats.bundle import Bundle
from sparse_export.formats.layers import LAYERS_FILE, read_engine_layers
from sparse_export.formats.listed import file_of
from sparse_export.instruments.interleave import LatencyResult
from sparse_export.instruments.outcome import reaches
from sparse_export.instruments.statistics import Ratio, paired_ratio, resolution
from sparse_export.runtimes.choice import KNOW_TWO_FOUR

__all__ = ["compare_latency", "speedup_missed"]


def compare_latency(
    opened: Opened, dense: Bundle, sparse: Bundle, timing: Timing, tell: Callable[[str], None]
) -> LatencyComparison:
    batch = timing["batch"]
    tell(f"latency at batch {batch}, {timing['rounds']} rounds")
    shape = dense.info.model.input_shape
    results = opened.sessions.measure(shape, **timing)
    on_device = opened.sessions.measure_on_device(shape, **timing)
    base, again, other = (results[name] for name in ("dense", "dense again", "sparse"))
    ratio = paired_ratio(base.samples_ms, other.samples_ms)
    control = paired_ratio(base.samples_ms, again.samples_ms)
    outcome, verdict = judge(
        batch=batch,
        ratio=ratio,
        control=control,
        same_shapes=_shapes(dense) == _shapes(sparse),
        share=_compacted_share(dense, sparse),
        has_zeros=sparse.info.n_nonzero < sparse.info.n_parameters,
        steady=base.steady and again.steady and other.steady,
        on_sparse_kernels=_on_sparse_kernels(opened.runtime, sparse),
        precisions=(dense.info.precision, sparse.info.precision),
    )
    return LatencyComparison(
        batch=batch,
        dense=base,
        dense_again=again,
        sparse=other,
        ratio=ratio,
        control=control,
        floor=resolution(control),
        outcome=outcome,
        verdict=verdict,
        on_device=on_device,
        device_ratio=_over_dense(on_device, "sparse"),
        device_control=_over_dense(on_device, "dense again"),
    )


def _over_dense(results: Mapping[str, LatencyResult], name: str) -> Ratio | None:
    return paired_ratio(results["dense"].samples_ms, results[name].samples_ms) if results else None


def _on_sparse_kernels(runtime: str, bundle: Bundle) -> str | None:
    """What is known of sparse kernels there, None for a runtime that has none."""
    if runtime not in KNOW_TWO_FOUR:
        return None
    if runtime not in TARGETS:
        return "it does not tell which layers it runs on them"
    rows = read_engine_layers(file_of(bundle, LAYERS_FILE), engine_of(bundle, runtime).file)
    counts = Counter(row.state for row in rows)
    told = ", ".join(f"{n} {state}" for state, n in counts.items())
    return f"of its layers {told or 'nothing is known'} (`inspect` says why)"


def _shapes(bundle: Bundle) -> tuple[Any, ...]:
    """What decides the work of a runtime that counts zeros like other weights."""
    return bundle.info.macs, bundle.info.n_parameters, Counter(layer.shape for layer in bundle.info.layers)


def _compacted_share(dense: Bundle, sparse: Bundle) -> float | None:
    """Parameters of a compacted sparse graph / those of the dense one; None when nothing was taken out."""
    a, b = dense.info.n_parameters, sparse.info.n_parameters
    return b / a if sparse.info.compacted is not None and 0 < b < a else None


def speedup_missed(latency: tuple[LatencyComparison, ...], required: float | None) -> str | None:
    if required is None:
        return None
    missed = [
        f"{at.ratio.estimate:.3f}x [{at.ratio.low:.3f}, {at.ratio.high:.3f}] at batch {at.batch}"
        for at in latency
        if not reaches(at.outcome, at.ratio, required)
    ]
    return f"The speed-up is {', '.join(missed)}." if missed else None
