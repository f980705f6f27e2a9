"""The pictures of a comparison, each with what it shows in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sparse_export.evaluate.comparison import Comparison, LatencyComparison, Side
from sparse_export.evaluate.verdict import times_text
from sparse_export.formats.layers import GraphLayer
from sparse_export.instruments.interleave import LatencyResult
from sparse_export.instruments.statistics import location
from sparse_export.pages.bars import Bar, BarGroup, Interval, bar_chart, interval_chart
from sparse_export.pages.charts import Point, Series, line_chart
from sparse_export.pages.document import figure
from sparse_export.report.side import BundleSide
from sparse_export.tasks.scores import better_text, difference_text

__all__ = ["SIZES", "densities", "latency", "score", "sizes", "speed_ups", "throughput", "training"]

_COLOURS = {"dense": 0, "sparse": 1}
SIZES: tuple[tuple[str, Callable[[Side], int | None]], ...] = (
    ("bytes of model.onnx", lambda side: side.size_bytes),
    ("nonzero parameters", lambda side: side.n_nonzero),
    ("multiply-adds by them, for a sample", lambda side: side.nonzero_macs),
)
MOST_LAYERS = 40  # drawn; the table has all


def score(comparison: Comparison) -> str:
    """The difference with its interval; nothing where it was not measured."""
    d, known = comparison.difference, comparison.dense.score
    if d is None or known is None:
        return ""
    text = difference_text(d, is_share=known.is_share)
    drawing = interval_chart(
        [Interval(label="sparse minus dense", estimate=d.amount, low=d.low, high=d.high, text=text)],
        none=0.0,
        title=f"Difference in {known.name}",
        x_label=f"{'percentage points' if known.is_share else known.name}; the dashed line is no difference",
        alt=f"{known.name} of sparse minus dense: {text}{', of 100' if known.is_share else ''}.",
    )
    caption = (
        f"{known.name[0].upper()}{known.name[1:]} of sparse minus dense on the same {d.n_samples:,} samples, "
        f"with its paired 95 % interval; {better_text(known)}."
    )
    if d.mcnemar_p is not None:
        caption += (
            f" {d.n_only_a:,} samples only dense has right, {d.n_only_b:,} only sparse; McNemar's p is "
            f"{d.mcnemar_p:.3g}."
        )
    return figure(drawing, caption)


def sizes(comparison: Comparison) -> str:
    """Bytes, parameters and multiply-adds of both."""
    groups = [
        BarGroup(
            label=label,
            bars=[
                Bar(name=name, value=float(count), text=f"{count:,}")
                for name, side in _sides(comparison)
                if (count := value(side)) is not None
            ],
        )
        for label, value in SIZES
    ]
    groups = [group for group in groups if group.bars]
    told = "; ".join(
        f"{group.label}: " + ", ".join(f"{bar.name} {bar.text}" for bar in group.bars) for group in groups
    )
    drawing = bar_chart(groups, title="Size and work", alt=f"Size and work. {told}.")
    return figure(drawing, "Size and work, each pair of bars on its own scale.")


def _sides(comparison: Comparison) -> tuple[tuple[str, Side], tuple[str, Side]]:
    return ("dense", comparison.dense), ("sparse", comparison.sparse)


def latency(comparison: Comparison) -> str:
    """Time of an undisturbed call at each batch, dense and sparse."""
    groups = [
        BarGroup(
            label=f"batch {at.batch}",
            bars=[_time(name, result) for name, result in (("dense", at.dense), ("sparse", at.sparse))],
        )
        for at in comparison.latency
    ]
    told = "; ".join(
        f"{group.label}: " + ", ".join(f"{bar.name} {bar.text}" for bar in group.bars) for group in groups
    )
    drawing = bar_chart(groups, title="Time of a call", alt=f"Time of a call in ms. {told}.")
    return figure(
        drawing,
        "Time of an undisturbed call in ms, with its 95 % interval over rounds; each batch on its own scale.",
    )


def _time(name: str, result: LatencyResult) -> Bar:
    at = location(result.samples_ms)
    text = f"{_ms(at.estimate)} [{_ms(at.low)}, {_ms(at.high)}]"
    return Bar(name=name, value=at.estimate, text=text, low=at.low, high=at.high)


def _ms(value: float) -> str:
    """Three digits, or whole ms; never with an exponent, which would take too much room."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def speed_ups(comparison: Comparison) -> str:
    """The ratio at each batch, against what two copies of the dense file differ by."""
    rows = [
        Interval(
            label=f"batch {at.batch}",
            estimate=at.ratio.estimate,
            low=at.ratio.low,
            high=at.ratio.high,
            text=times_text(at.ratio),
            band=(1 / at.floor, at.floor),
        )
        for at in comparison.latency
    ]
    told = "; ".join(f"{row.label}: {row.text}" for row in rows)
    drawing = interval_chart(
        rows,
        none=1.0,
        title="Speed-up",
        x_label="dense time / sparse time; right of the line is faster",
        alt=f"Dense time by sparse time. {told}.",
    )
    caption = (
        "Dense time by sparse time, with its paired 95 % interval. The grey band is what two copies of the "
        "same dense file differ by here: a speed-up is claimed only where the whole interval lies right of "
        "it."
    )
    return figure(drawing, caption)


def throughput(comparison: Comparison) -> str:
    """Samples a second against the time of a call; a point for each batch."""
    series = [
        Series(name=name, points=[_point(at, side) for at in comparison.latency])
        for name, side in (("dense", "dense"), ("sparse", "sparse"))
    ]
    told = "; ".join(
        f"{one.name}: "
        + ", ".join(
            f"batch {at.batch} {point.y:.4g} samples/s at {point.x:.3g} ms"
            for at, point in zip(comparison.latency, one.points, strict=True)
        )
        for one in series
    )
    drawing = line_chart(
        series,
        title="Throughput against latency",
        x_label="median time of a call, ms",
        y_label="samples a second",
        log_x=True,
        alt=f"Throughput against latency. {told}.",
    )
    batches = ", ".join(str(at.batch) for at in comparison.latency)
    return figure(
        drawing,
        f"Samples a second, by the mean of all calls, against the median time of a call, at batch {batches} "
        "from left to right.",
    )


def _point(at: LatencyComparison, side: str) -> Point:
    result = at.dense if side == "dense" else at.sparse
    return Point(x=result.median_ms, y=1e3 * at.batch / result.mean_ms)


def densities(layers: Sequence[GraphLayer]) -> str:
    """Density of each layer of the sparse graph."""
    known = [layer for layer in layers if layer.n_weights]
    if not known:
        return ""
    bars = [
        Bar(
            name=layer.weight,
            value=layer.n_nonzero / layer.n_weights,
            text=f"{layer.n_nonzero / layer.n_weights:.3g}",
            colour=_COLOURS["sparse"],
        )
        for layer in known[:MOST_LAYERS]
    ]
    told = ", ".join(f"{bar.name} {bar.text}" for bar in bars)
    more = f" The other {len(known) - MOST_LAYERS} are in the table." if len(known) > MOST_LAYERS else ""
    return figure(
        bar_chart(
            [BarGroup(label="", bars=bars, most=1.0)],
            title="Density of each layer",
            alt=f"Density of each layer: {told}.",
            wide_names=True,
        ),
        f"Share of each layer's weights that are not zero; a whole row would be dense.{more}",
    )


def training(sides: Sequence[BundleSide]) -> list[str]:
    """Loss, validation score and churn of the masks, epoch by epoch; only what there is a record of."""
    name, unit, better = _validated(sides)
    wanted = (
        (
            "Training loss",
            "mean loss of the epoch",
            "train_loss",
            1.0,
            "Mean training loss of each epoch, on a logarithmic scale.",
        ),
        (
            f"Validation {name}",
            f"validation {name}{unit}",
            "validation_score",
            1.0,
            f"Score on the validation part, which the test set is no part of{better}.",
        ),
        (
            "Mask churn",
            "masked weights that changed, %",
            "flip_rate",
            100.0,
            (
                "Mask churn: bits of the masks that the update of each epoch changed, in % of the masked "
                "weights."
            ),
        ),
    )
    return [
        figure(
            line_chart(
                series,
                title=title,
                x_label="epoch",
                y_label=y_label,
                log_y=key == "train_loss",
                alt=_told(title, series),
            ),
            caption,
        )
        for title, y_label, key, factor, caption in wanted
        if (series := _courses(sides, key, factor))
    ]


def _validated(sides: Sequence[BundleSide]) -> tuple[str, str, str]:
    """Name and unit of the score in the record of the epochs, and which way is better."""
    runs = [side.run for side in sides if side.run is not None]
    scores = [one for run in runs for one in (run.validation, run.test) if one is not None]
    if not scores:
        return "score", "", ""
    return scores[0].name, ", %" if scores[0].is_share else "", f"; {better_text(scores[0])}"


def _courses(sides: Sequence[BundleSide], key: str, factor: float) -> list[Series]:
    found = [
        Series(
            name=side.name,
            points=[
                Point(x=float(line["epoch"]), y=factor * value)
                for line in side.metrics
                if (value := _number(line.get(key))) is not None and "epoch" in line
            ],
            colour=_COLOURS[side.name],
        )
        for side in sides
    ]
    return [series for series in found if series.points]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _told(title: str, series: Sequence[Series]) -> str:
    parts = [
        f"{one.name} from {one.points[0].y:.4g} to {one.points[-1].y:.4g} over {len(one.points)} "
        f"epoch{'' if len(one.points) == 1 else 's'}"
        for one in series
    ]
    return f"{title}: {'; '.join(parts)}."
