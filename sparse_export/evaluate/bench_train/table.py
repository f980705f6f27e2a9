"""The times of a training step as a table for people."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from sparse_export.instruments.conditions import how_timed

if TYPE_CHECKING:
    from sparse_export.evaluate.bench_train.result import StepBench

__all__ = ["table"]

_WIDTH = 98
Row = tuple[str, float, float, str]


def table(result: StepBench) -> str:
    """Dense beside sparse, part by part, then which products were chosen, the verdict and the conditions."""
    lines = [
        f"{result.model}, batches of {result.batch} of {result.input_shape}, density {result.density:.4g}, "
        + f"{result.recipe['precision']}{', compiled' if result.recipe['compile'] else ''}, on {result.device}",
        "",
        f"{'':<24}{'dense':>12}{'sparse':>12}",
    ]
    lines += [f"{a:<24}{b:>12.4g}{c:>12.4g}   {d}".rstrip() for a, b, c, d in _rows(result)]
    lines += [""] + [f"{fact.name} by {fact.by}: {fact.reason}" for fact in result.products]
    lines += [""] if result.products else []
    for note in (result.verdict, "", _conditions(result)):
        lines += textwrap.wrap(note, _WIDTH, subsequent_indent="  ") if note else [""]
    return "\n".join(lines)


def _rows(result: StepBench) -> list[Row]:
    dense, sparse = result.dense, result.sparse
    one, other = dense.latency, sparse.latency
    rows: list[Row] = [
        ("steps/s", dense.steps_per_s, sparse.steps_per_s, ""),
        ("samples/s", dense.samples_per_s, sparse.samples_per_s, ""),
        ("median ms a step", one.median_ms, other.median_ms, f"{result.ratio} as fast"),
        ("mean ms a step", one.mean_ms, other.mean_ms, ""),
        *((f"  {name}", dense.part_ms[name], sparse.part_ms[name], "") for name in dense.part_ms),
        ("90th percentile ms", one.p90_ms, other.p90_ms, ""),
    ]
    if result.phases is not None:
        phases = result.phases
        window = phases.window.latency.mean_ms
        rows.append(("in the window, mean ms", one.mean_ms, window, f"{phases.window_steps} steps"))
        rows.append(("all in all, mean ms", one.mean_ms, phases.mean_ms, "with its share of an update"))
    again = result.dense_again.latency.median_ms
    rows.append(("control: dense twice", one.median_ms, again, f"{result.control} should hold 1"))
    return rows


def _conditions(result: StepBench) -> str:
    where = [str(gpu["name"]) for gpu in result.machine["gpus"]] if result.device == "cuda" else []
    load = result.machine["load_average"]
    where += [result.machine["cpu_model"] or "unknown CPU", f"load {load[0] if load else '?'}"]
    return (
        f"torch {result.versions['torch']}, {how_timed(result)}, random inputs, learning rate 0, 95 % intervals; "
        f"{', '.join(where)}."
    )
