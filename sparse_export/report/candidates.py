"""The page of several sparse networks, each compared with the same dense one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparse_export.evaluate.candidates import METHOD, Candidates
from sparse_export.evaluate.comparison import Comparison, change_of_score
from sparse_export.evaluate.verdict import times_text
from sparse_export.files import write_bytes
from sparse_export.formats.bundle import Bundle
from sparse_export.pages.bars import Bar, BarGroup, Interval, bar_chart, interval_chart
from sparse_export.pages.charts import Point, Series, line_chart
from sparse_export.pages.document import document, figure, table
from sparse_export.pages.escaping import escape
from sparse_export.report import pictures, tables
from sparse_export.report.cards import Card, cards_of, drawn_cards, next_steps
from sparse_export.report.page import figures, layer_legend, listed
from sparse_export.report.side import BundleSide, side_of
from sparse_export.report.verdict import verdict
from sparse_export.tasks.scores import better_text, difference_text, value_text
from sparse_export.version import command_line

__all__ = ["candidates_page", "write_candidates_report"]


def write_candidates_report(path: Path, found: Candidates, dense: Bundle, sparse: Sequence[Bundle]) -> Path:
    """Write the page of several candidates.

    Returns:
        Its path.

    Raises:
        OutputError: it cannot be written.
        ArtefactError: a bundle cannot be read.
    """
    sides = [side_of(name, one) for name, one in zip(found.names, sparse, strict=True)]
    content = candidates_page(found, side_of("dense", dense), sides)
    write_bytes(path, content.encode("utf-8", "backslashreplace"))
    return path


def candidates_page(found: Candidates, dense: BundleSide, sparse: Sequence[BundleSide]) -> str:
    """The whole HTML. It computes no figure but the positions of what it draws."""
    pairs = list(zip(found.names, found.comparisons, strict=True))
    first = found.comparisons[0]
    paths = [["dense", first.dense.path], *([name, one.sparse.path] for name, one in pairs)]
    steps = {
        step: [name for (name, one), side in zip(pairs, sparse, strict=True) if step in next_steps(one, side)]
        for (_, one), side in zip(pairs, sparse, strict=True)
        for step in next_steps(one, side)
    }
    parts = [
        *(_verdict(name, one) for name, one in pairs),
        drawn_cards([_card(name, one) for name, one in pairs]),
        *listed("What to do next", [f"{', '.join(names)}: {step}" for step, names in steps.items()]),
        table(["", ""], paths, text_columns=(0, 1), wrap=True),
        "<h2>Score against speed</h2>",
        _score_against_speed(pairs),
        "<h2>Score and size</h2>",
        figures(_scores(pairs), _sizes(pairs)),
        _figures_table(pairs),
        *tables.recall_per_class(pairs),
        "<h2>Time of a call</h2>",
        f"<p>{escape(METHOD)}</p>",
        figures(*(_speed_ups(pairs, at) for at in range(len(first.latency)))),
        *(f"<p><b>{escape(name)}</b>: {escape(at.verdict)}</p>" for name, one in pairs for at in one.latency),
    ]
    for side in sparse:
        parts += [
            f"<h2>Layers of {escape(side.name)}</h2>",
            pictures.densities(side.inspection.graph),
            tables.layers(side),
            layer_legend(side),
            *tables.layer_times(side),
        ]
    parts += ["<h2>Where it was measured</h2>", tables.environment(first)]
    parts += ["<h2>Commands that made it</h2>", tables.commands((dense, *sparse), command_line())]
    model = first.sparse.model or "network"
    return document(f"{model}: dense against {len(pairs)} candidates", [part for part in parts if part])


def _verdict(name: str, comparison: Comparison) -> str:
    failed = bool(comparison.gate_failed or comparison.speedup_missed)
    text = f"<b>{escape(name)}</b>: {escape(verdict(comparison))}"
    return f'<p class="verdict{" failed" if failed else ""}">{text}</p>'


def _card(name: str, comparison: Comparison) -> Card:
    """A candidate in four lines: score, size, speed, and what was required."""
    score, size, speed, required = cards_of(comparison)
    tones = {one.tone for one in (score, speed)}
    tone = required.tone if required.tone != "plain" else "bad" if "bad" in tones else "plain"
    return Card(
        title=name,
        word=f"requirements {required.word}" if required.tone != "plain" else score.word,
        tone=tone,
        figure=score.figure,
        lines=(
            f"{score.title}: {score.word}; {change_of_score(comparison) or 'no difference known'}",
            f"{size.title}: {size.figure}, {size.word}",
            f"{speed.title}: {speed.figure}, {speed.word}",
            *required.lines[: 2 * (required.tone != "plain")],
        ),
    )


Pairs = Sequence[tuple[str, Comparison]]


def _scores(pairs: Pairs) -> str:
    rows = []
    for name, one in pairs:
        d, known = one.difference, one.dense.score
        if d is not None and known is not None:
            text = difference_text(d, is_share=known.is_share)
            rows.append(Interval(label=name, estimate=d.amount, low=d.low, high=d.high, text=text))
    known = pairs[0][1].dense.score
    if not rows or known is None:
        return ""
    told = "; ".join(f"{row.label}: {row.text}" for row in rows)
    drawing = interval_chart(
        rows,
        none=0.0,
        title=f"Difference in {known.name}",
        x_label=f"{'percentage points' if known.is_share else known.name}; the dashed line is dense",
        alt=f"{known.name} of each candidate minus dense: {told}.",
    )
    caption = (
        f"{known.name} of each candidate minus dense on the same samples, with its paired 95 % interval; "
        f"{better_text(known)}."
    )
    return figure(drawing, caption)


def _sizes(pairs: Pairs) -> str:
    sides = [("dense", pairs[0][1].dense), *((name, one.sparse) for name, one in pairs)]
    groups = [
        BarGroup(
            label=label,
            bars=[
                Bar(name=name, value=float(n), text=f"{n:,}") for name, side in sides if (n := value(side))
            ],
        )
        for label, value in pictures.SIZES
    ]
    groups = [group for group in groups if group.bars]
    told = "; ".join(
        f"{group.label}: " + ", ".join(f"{bar.name} {bar.text}" for bar in group.bars) for group in groups
    )
    drawing = bar_chart(groups, title="Size and work", alt=f"Size and work. {told}.", wide_names=True)
    return figure(drawing, "Size and work, each group of bars on its own scale.")


def _speed_ups(pairs: Pairs, n: int) -> str:
    at = [(name, one.latency[n]) for name, one in pairs]
    rows = [
        Interval(
            label=name,
            estimate=one.ratio.estimate,
            low=one.ratio.low,
            high=one.ratio.high,
            text=times_text(one.ratio),
            band=(1 / one.floor, one.floor),
        )
        for name, one in at
    ]
    batch = at[0][1].batch
    told = "; ".join(f"{row.label}: {row.text}" for row in rows)
    drawing = interval_chart(
        rows,
        none=1.0,
        title=f"Speed-up at batch {batch}",
        x_label="dense time / sparse time; right of the line is faster",
        alt=f"Dense time by sparse time at batch {batch}. {told}.",
    )
    caption = (
        f"Batch {batch}: dense time by sparse time, with its paired 95 % interval. The grey band is what two "
        "copies of the dense file differed by while this candidate was timed."
    )
    return figure(drawing, caption)


def _score_against_speed(pairs: Pairs) -> str:
    """A point for each candidate, at the largest batch."""
    known = pairs[0][1].dense.score
    if known is None or not pairs[0][1].latency:
        return ""
    points = [("dense", Point(x=1.0, y=known.figure))]
    for name, one in pairs:
        if one.sparse.score is not None:
            points.append((name, Point(x=one.latency[-1].ratio.estimate, y=one.sparse.score.figure)))
    batch = pairs[0][1].latency[-1].batch
    told = "; ".join(f"{name}: {point.y:.4g} at {point.x:.3g}" for name, point in points)
    drawing = line_chart(
        [Series(name=name, points=[point]) for name, point in points],
        title="Score against speed",
        x_label=f"dense time / sparse time at batch {batch}",
        y_label=f"{known.name}{', %' if known.is_share else ''}",
        alt=f"{known.name} against dense time by sparse time at batch {batch}. {told}.",
    )
    caption = f"A point for each network; {better_text(known)}, and further right is faster. Intervals below."
    return figure(drawing, caption)


def _figures_table(pairs: Pairs) -> str:
    dense = pairs[0][1].dense
    known = dense.score
    head = ["", known.name if known else "score", "against dense", "density", "precision", "bytes", "nonzero"]
    sides = [("dense", dense, ""), *((name, one.sparse, change_of_score(one)) for name, one in pairs)]
    rows = [
        [
            name,
            value_text(side.score),
            change,
            f"{side.density:.4f}",
            side.precision,
            f"{side.size_bytes:,}",
            f"{side.n_nonzero:,}",
        ]
        for name, side, change in sides
    ]
    return table(head, rows, text_columns=(0, 2, 4))
