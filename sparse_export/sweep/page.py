"""The page of a sweep: table and charts in one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_export.errors import SparseExportError
from sparse_export.instruments.statistics import Mean
from sparse_export.pages.charts import Point, Series, line_chart
from sparse_export.pages.document import document, table
from sparse_export.pages.escaping import escape
from sparse_export.sparsity import pattern_from_text
from sparse_export.sweep.grid import DENSE
from sparse_export.sweep.run_list import PATTERN, heading, setting_text
from sparse_export.sweep.running import Finding
from sparse_export.sweep.table import Row, best_rows, direction_text, ratio_text, score_name, share_text
from sparse_export.tasks.scores import mean_text
from sparse_export.train.metrics import read_metrics

_MOST_COURSES = 24


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the runs of a page come from.

    Args:
        title: of the page.
        varied: keys that have a chart of their own.
        heading, text: what is quoted at the end.
    """

    title: str
    varied: Sequence[str]
    heading: str
    text: str


def page(source: Source, findings: Sequence[Finding], rows: Sequence[Row], facts: str) -> str:
    """The whole HTML document. facts: where and when, for people."""
    n_complete = sum(finding.status == "complete" for finding in findings)
    failed = [finding for finding in findings if finding.status == "failed"]
    parts = [
        f"<p>{n_complete} of {len(findings)} runs are complete. {escape(facts)}</p>",
        (
            f"<p>Scores: mean over the seeds ± half of its 95 % Student t interval. "
            f"{escape(direction_text(rows, 'bold'))} Choose by validation; the test set was read once a run, "
            "at its end.</p>"
        ),
        _table(rows),
        (
            "<p>The estimates are the paper's, by its own definitions, for the convolutions: dense time over "
            "the time "
            "without empty channels, and without any multiplication by zero. Nothing of them was measured. "
            "<b>ms per step is what was measured</b>, with these runs side by side on this machine; it is "
            "the one to "
            "go by, and no estimate says anything of it.</p>"
        ),
        (
            "<p>Training multiply-adds are counted from the density over time, as the RigL paper does: "
            "forward and for both gradients, with zeros left out, and with the whole gradient of a weight in "
            "the steps in which growth reads it. <b>Ever active</b>: the share of weights that were tried at "
            "some time.</p>"
        ),
        "<h2>Score against density</h2>",
        score_chart(rows),
        "<h2>Score against training multiply-adds</h2>",
        cost_chart(rows),
    ]
    for key in source.varied:
        parts += [f"<h2>Sensitivity to {escape(key)}</h2>", sensitivity_chart(rows, key)]
    parts += ["<h2>Density of each layer over time</h2>", *_courses(findings)]
    if failed:
        items = "".join(f"<li>{escape(one.cell.name)}: {escape(one.reason)}</li>" for one in failed)
        parts += ["<h2>Runs that failed</h2>", f"<ul>{items}</ul>"]
    parts += [f"<h2>{escape(source.heading)}</h2>", f"<pre>{escape(source.text)}</pre>"]
    return document(source.title, parts)


def _table(rows: Sequence[Row]) -> str:
    head = (
        "method, density, setting",
        "runs",
        f"test {score_name(rows)}",
        f"validation {score_name(rows)}",
        "training multiply-adds / dense",
        "mean density",
        "ever active",
        "estimate: channels",
        "estimate: MACs",
        "all layers: channels",
        "all layers: MACs",
        "measured: ms per step",
    )
    lines = [
        (
            row.label,
            f"{row.n_complete}/{row.n_cells}",
            mean_text(row.test, is_share=row.is_share),
            mean_text(row.validation, is_share=row.is_share),
            share_text(row.training_share),
            share_text(row.mean_density),
            share_text(row.explored),
            ratio_text(row.estimate_channels),
            ratio_text(row.estimate_macs),
            ratio_text(row.all_layers_estimate_channels),
            ratio_text(row.all_layers_estimate_macs),
            "-" if row.step_ms is None else f"{row.step_ms:.3g}",
        )
        for row in rows
    ]
    bold = {(at, 2) for at in best_rows(rows, "test")} | {(at, 3) for at in best_rows(rows, "validation")}
    return table(head, lines, bold=bold)


def score_chart(rows: Sequence[Row]) -> str:
    """Test score against density, a line for each method and setting, and the dense mean across."""
    lines: dict[str, list[Point]] = {}
    for row in rows:
        if row.method != DENSE and row.test is not None:
            # A varied pattern is the density of a point where no other was asked for, and no part of the
            # line's name.
            is_point = row.density is None and PATTERN in dict(row.setting)
            name = heading(row.method, None if is_point else row.pattern, None) + setting_text(row.setting)
            lines.setdefault(name, []).append(_point(_density_of(row), row.test))
    level, note = _dense_line(rows)
    chart = line_chart(
        [Series(name=name, points=sorted(points, key=lambda one: one.x)) for name, points in lines.items()],
        title=f"Test {score_name(rows)} against density",
        x_label="density",
        y_label=f"test {score_name(rows)}",
        log_x=True,
        level=level,
    )
    return chart + note


def cost_chart(rows: Sequence[Row]) -> str:
    """Test score against the multiply-adds of the training, a line for each method and setting."""
    lines: dict[str, list[Point]] = {}
    for row in rows:
        if row.test is not None and row.training_share is not None:
            name = heading(row.method, None, None) + setting_text(row.setting)
            lines.setdefault(name, []).append(_point(row.training_share, row.test))
    if not lines:
        return "<p>Of no complete run are they known.</p>"
    return line_chart(
        [Series(name=name, points=sorted(points, key=lambda one: one.x)) for name, points in lines.items()],
        title=f"Test {score_name(rows)} against training multiply-adds",
        x_label="training multiply-adds / dense",
        y_label=f"test {score_name(rows)}",
        log_x=True,
    )


def _dense_line(rows: Sequence[Row]) -> tuple[Series | None, str]:
    """The dense mean, called by its setting, and how it was chosen of several: by validation; by test where
    one has none.
    """
    dense = [(row, row.test) for row in rows if row.method == DENSE and row.test is not None]
    if not dense:
        return None, ""
    by_validation = [row.validation.mean for row, _ in dense if row.validation is not None]
    has_validation = len(by_validation) == len(dense)
    marks = by_validation if has_validation else [test.mean for _, test in dense]
    row, test = dense[marks.index((max if dense[0][0].higher_is_better else min)(marks))]
    note = ""
    if len(dense) > 1:
        part = "validation" if has_validation else "test, as not all have a validation part"
        note = (
            f"<p>The line across is {escape(row.label)}: the best of "
            f"{len(dense)} dense settings by {part}.</p>"
        )
    return Series(name=row.label, points=[_point(1.0, test)]), note


def _density_of(row: Row) -> float:
    """What was asked for, or what the pattern allows."""
    if row.density is None and row.pattern is not None:
        return pattern_from_text(row.pattern).density
    return row.density or 1.0


def sensitivity_chart(rows: Sequence[Row], key: str) -> str:
    """Test score against the values of one varied key; a line for each method, density and other
    setting.
    """
    values = sorted({dict(row.setting)[key] for row in rows if key in dict(row.setting)}, key=_order)
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    lines: dict[str, list[Point]] = {}
    for row in rows:
        setting = dict(row.setting)
        if key not in setting or row.test is None:
            continue
        name = heading(row.method, None if key == PATTERN else row.pattern, row.density)
        name += setting_text(row.setting, without=key)
        x = float(setting[key]) if numeric else float(values.index(setting[key]))
        lines.setdefault(name, []).append(_point(x, row.test))
    names = "" if numeric else ": " + ", ".join(f"{n} is {value}" for n, value in enumerate(values))
    return line_chart(
        [Series(name=name, points=sorted(points, key=lambda one: one.x)) for name, points in lines.items()],
        title=f"Test {score_name(rows)} against {key}",
        x_label=f"{key}{names}",
        y_label=f"test {score_name(rows)}",
    )


def _order(value: object) -> tuple[bool, float, str]:
    if isinstance(value, int | float):
        return False, float(value), ""
    return True, 0.0, str(value)


def _courses(findings: Sequence[Finding]) -> list[str]:
    """A chart for the first complete seed of each method, density and setting."""
    seen: set[tuple[object, ...]] = set()
    charts: list[str] = []
    for finding in findings:
        cell = finding.cell
        key = (cell.method, cell.density, cell.setting)
        if finding.status != "complete" or cell.method == DENSE or key in seen:
            continue
        seen.add(key)
        if len(charts) < _MOST_COURSES:
            name = heading(cell.method, cell.pattern, cell.density) + setting_text(cell.setting)
            charts.append(_course(finding.run, f"{name}, seed {cell.seed}"))
    left_out = len(seen) - len(charts)
    if left_out:
        charts.append(f"<p>{left_out} more are in metrics.jsonl of their runs.</p>")
    return charts or ["<p>No sparse run is complete yet.</p>"]


def _course(run: Path, title: str) -> str:
    try:
        lines = read_metrics(run)
    except (OSError, ValueError, SparseExportError):
        return f"<p>{escape(title)}: metrics.jsonl cannot be read.</p>"
    layers: dict[str, list[Point]] = {}
    for line in lines:
        for name, density in line["layer_density"].items():
            layers.setdefault(name, []).append(Point(x=line["epoch"], y=density))
    return f"<h3>{escape(title)}</h3>" + line_chart(
        [Series(name=name, points=points) for name, points in layers.items()],
        title=f"Density of each layer: {title}",
        x_label="epoch",
        y_label="density",
    )


def _point(x: float, mean: Mean) -> Point:
    return Point(x=x, y=mean.mean, half_width=mean.half_width)
