"""A comparison as a table for people."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from sparse_export.instruments.conditions import how_timed

if TYPE_CHECKING:
    from sparse_export.evaluate.comparison.result import Comparison, LatencyComparison

__all__ = ["table"]

_WIDTH = 98
Row = tuple[str, str, str, str]


def table(comparison: Comparison) -> str:
    """Both bundles side by side, what is to be said of them, and under which conditions it was measured."""
    rows = [("", "dense", "sparse", "sparse against dense"), ("", "", "", "")]
    rows += [_accuracy_row(comparison), *_size_rows(comparison)]
    for at in comparison.latency:
        rows += [("", "", "", ""), *_latency_rows(at)]
    lines = [f"dense   {comparison.dense.path}", f"sparse  {comparison.sparse.path}", ""]
    lines += [f"{a:<26}{b:>14}{c:>14}   {d}".rstrip() for a, b, c, d in rows]
    lines.append("")
    for note in _notes(comparison):
        lines += textwrap.wrap(note, _WIDTH, subsequent_indent="  ")
    lines += ["", *textwrap.wrap(_conditions(comparison), _WIDTH)]
    return "\n".join(lines)


def _size_rows(comparison: Comparison) -> list[Row]:
    dense, sparse = comparison.dense, comparison.sparse
    rows = [
        ("density of masked layers", f"{dense.density:.4f}", f"{sparse.density:.4f}", ""),
        ("precision", dense.precision, sparse.precision, ""),
    ]
    for title, a, b in (
        ("model.onnx, bytes", dense.size_bytes, sparse.size_bytes),
        ("parameters", dense.n_parameters, sparse.n_parameters),
        ("  of them not zero", dense.n_nonzero, sparse.n_nonzero),
        ("multiply-adds a sample", dense.macs, sparse.macs),
        ("  by a weight not zero", dense.nonzero_macs, sparse.nonzero_macs),
    ):
        rows.append((title, _count(a), _count(b), f"{b / a:.4f} of dense" if a and b is not None else ""))
    return rows


def _latency_rows(at: LatencyComparison) -> list[Row]:
    again = at.dense_again
    rows = [
        (
            f"batch {at.batch}, median ms",
            *_ms(at.dense.median_ms, at.sparse.median_ms),
            f"{at.ratio} as fast",
        ),
        ("  mean ms", *_ms(at.dense.mean_ms, at.sparse.mean_ms), ""),
        ("  90th percentile ms", *_ms(at.dense.p90_ms, at.sparse.p90_ms), ""),
        ("  99th percentile ms", *_ms(at.dense.p99_ms, at.sparse.p99_ms), ""),
        ("  timed calls", _count(at.dense.n_calls), _count(at.sparse.n_calls), ""),
        (
            "  control: dense twice, ms",
            *_ms(at.dense.median_ms, again.median_ms),
            f"{at.control} should hold 1",
        ),
    ]
    if at.device_ratio is not None and at.device_control is not None:
        dense, again, sparse = (at.on_device[name] for name in ("dense", "dense again", "sparse"))
        alone, control = f"{at.device_ratio} as fast", f"{at.device_control} should hold 1"
        rows.append(("  on the device alone, ms", *_ms(dense.median_ms, sparse.median_ms), alone))
        rows.append(("    control: dense twice", *_ms(dense.median_ms, again.median_ms), control))
    return rows


def _notes(comparison: Comparison) -> list[str]:
    """What is to be said below the figures, a paragraph each."""
    notes = [*(at.verdict for at in comparison.latency), _accuracy_note(comparison)]
    notes += [f"Passed over: {name}: {why}" for name, why in comparison.passed_over.items()]
    if comparison.cards.throttled:
        notes.append(f"The card's clock was held down meanwhile: {', '.join(comparison.cards.throttled)}.")
    failed = (comparison.gate_failed, comparison.speedup_missed)
    return notes + [f"FAILED: {missed}" for missed in failed if missed]


def _accuracy_row(comparison: Comparison) -> Row:
    percents = [
        f"{a.percent:.2f} %" if a else "not measured"
        for a in (comparison.dense.accuracy, comparison.sparse.accuracy)
    ]
    change = ""
    if comparison.difference:
        d = comparison.difference
        change = f"{d.points:+.2f} points [{d.low:+.2f}, {d.high:+.2f}]"
    elif comparison.accuracy_drop_points is not None:
        change = f"{0.0 - comparison.accuracy_drop_points:+.2f} points"
    return "accuracy", percents[0], percents[1], change


def _accuracy_note(comparison: Comparison) -> str:
    if comparison.difference:
        d = comparison.difference
        return (
            f"Accuracy: measured with these files on {d.n_samples:,} samples, the same for both; "
            f"{d.n_only_a:,} only dense has right, {d.n_only_b:,} only sparse."
        )
    if comparison.accuracy_source == "recorded":
        return (
            "Accuracy: as recorded when the bundles were built, not measured again, so without an interval."
        )
    missing = [
        n for n, s in (("dense", comparison.dense), ("sparse", comparison.sparse)) if s.accuracy is None
    ]
    return (
        f"Accuracy: not measured, as no labelled samples were given; the {' and the '.join(missing)} bundle "
        f"record{'s' if len(missing) == 1 else ''} none."
    )


def _conditions(comparison: Comparison) -> str:
    machine = comparison.machine
    version = next((v for k, v in comparison.versions.items() if k.startswith("onnxruntime")), "")
    load = machine["load_average"]
    where = [machine["cpu_model"] or "unknown CPU", f"{machine['n_cores_usable']} cores"]
    where += [f"load {load[0]}"] if load else []
    return f"{comparison.runtime} {version}, {how_timed(comparison)}, 95 % intervals; {', '.join(where)}."


def _count(n: int | None) -> str:
    return "?" if n is None else f"{n:,}"


def _ms(a: float | None, b: float | None) -> tuple[str, str]:
    return _milliseconds(a), _milliseconds(b)


def _milliseconds(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:.4g}"
