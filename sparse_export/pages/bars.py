"""Bars and intervals as SVG text, one below the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

from sparse_export.pages.charts import N_COLOURS, WIDTH, Axis, drawing
from sparse_export.pages.escaping import escape

__all__ = ["Bar", "BarGroup", "Interval", "bar_chart", "interval_chart"]

_BAR, _GAP, _HEAD, _ROW = 20, 4, 20, 42
_NAME = 52  # default width of the names of bars
_TEXT = 170  # room for the text behind the longest bar
_LETTER = 6.6  # width of a letter, about


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A horizontal bar from 0.

    Attributes:
        name: in front of the bar.
        value: its length.
        text: the value as written behind the bar.
        low: end of its interval, None for none.
        high: end of its interval, None for none.
        colour: its number; None for one that bars of the same name share.
    """

    name: str
    value: float
    text: str
    low: float | None = None
    high: float | None = None
    colour: int | None = None


@dataclass(frozen=True, kw_only=True)
class BarGroup:
    """Bars that share a scale.

    Attributes:
        label: the heading above them; empty for none.
        bars: from top to bottom.
        most: the value of the full width, None for that of the longest bar.
    """

    label: str
    bars: Sequence[Bar]
    most: float | None = None


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its interval.

    Attributes:
        label: above it.
        estimate: the dot.
        low: end of the interval.
        high: end of the interval.
        text: the numbers as written.
        band: ends of the band around the line of no difference, None for none.
    """

    label: str
    estimate: float
    low: float
    high: float
    text: str
    band: tuple[float, float] | None = None


def bar_chart(groups: Sequence[BarGroup], *, title: str, alt: str, wide_names: bool = False) -> str:
    """Draw horizontal bars from 0, each with its value as text.

    Args:
        groups: from top to bottom; values that are not finite are written, not drawn.
        title: of the drawing.
        alt: what it shows, in words.
        wide_names: shorter bars leave room for longer names; names that are longer still are truncated.

    Returns:
        SVG.
    """
    names = list(dict.fromkeys(bar.name for group in groups for bar in group.bars))
    left = 3 * _NAME if wide_names else _NAME
    full = WIDTH - left - (_TEXT / 3 if wide_names else _TEXT)
    parts: list[str] = []
    y = 4.0
    for group in groups:
        if group.label:
            parts.append(f'<text x="0" y="{y + 12:g}" font-weight="600">{escape(group.label)}</text>')
            y += _HEAD
        reach = [abs(value) for bar in group.bars for value in (bar.value, bar.high) if _is_finite(value)]
        most = group.most or max(reach, default=1.0) or 1.0
        for bar in group.bars:
            colour = names.index(bar.name) if bar.colour is None else bar.colour
            parts += _bar(bar, colour % N_COLOURS, y, most, left, full)
            y += _BAR
        y += 8 if group.label else 0
    return drawing(parts, height=y + 4, title=title, alt=alt)


def _truncate(text: str, width: float) -> str:
    """The end of a text, as much as fits a width."""
    n = int(width / _LETTER)
    return text if len(text) <= n else f"…{text[1 - n :]}"


def _is_finite(value: float | None) -> TypeGuard[float]:
    """Is it a finite number?"""
    return value is not None and math.isfinite(value)


def _bar(bar: Bar, colour: int, y: float, most: float, left: float, full: float) -> list[str]:
    def at(value: float) -> float:
        return round(left + full * min(max(value / most, 0.0), 1.0), 2)

    middle = y + (_BAR - _GAP) / 2
    end = left
    parts = [f'<text x="0" y="{middle + 4:g}">{escape(_truncate(bar.name, left - 4))}</text>']
    if _is_finite(bar.value):
        end = at(bar.value)
        parts.append(
            f'<g class="c{colour}"><rect x="{left}" y="{y:g}" width="{round(end - left, 2):g}" '
            f'height="{_BAR - _GAP}" '
            f'fill="currentColor"><title>{escape(f"{bar.name}: {bar.text}")}</title></rect></g>'
        )
        if bar.low is not None and bar.high is not None:
            low, high = at(bar.low), at(bar.high)
            parts.append(_whisker(low, high, middle))
            end = max(end, high)
    parts.append(f'<text x="{end + 6:g}" y="{middle + 4:g}">{escape(bar.text)}</text>')
    return parts


def _whisker(low: float, high: float, y: float) -> str:
    ends = "".join(f"M{x:g} {y - 4:g}V{y + 4:g}" for x in (low, high))
    return f'<path d="M{low:g} {y:g}H{high:g}{ends}" fill="none" stroke="var(--ink)" stroke-width="1.4"/>'


def interval_chart(rows: Sequence[Interval], *, none: float, title: str, x_label: str, alt: str) -> str:
    """Draw estimates as dots with their intervals, each below its label.

    Args:
        rows: from top to bottom.
        none: the value of the line of no difference.
        title: of the drawing.
        x_label: below the axis.
        alt: what it shows, in words.

    Returns:
        SVG.
    """
    values = [none] + [value for row in rows for value in (row.low, row.high, *(row.band or ()))]
    axis = Axis(values, 8, WIDTH - 8, log=False)
    bottom = 8 + _ROW * len(rows)
    parts: list[str] = []
    last = -math.inf
    for tick in axis.ticks:
        x = axis.at(tick)
        if x - last >= 44 and 16 < x < WIDTH - 16:
            parts.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{tick:.3g}</text>')
            last = x
    for n, row in enumerate(rows):
        parts += _interval(row, 8 + _ROW * n, axis, none)
    parts.append(f'<text x="{WIDTH / 2}" y="{bottom + 36}" text-anchor="middle">{escape(x_label)}</text>')
    return drawing(parts, height=bottom + 44, title=title, alt=alt)


def _interval(row: Interval, top: float, axis: Axis, none: float) -> list[str]:
    """The label, and below it the lines of the axis, the band, and the interval."""
    from_y, to_y, y = top + 18, top + _ROW - 4, top + 28
    text = f"{row.label}: {row.text}"
    parts = [f'<text x="8" y="{top + 13}">{escape(text)}</text>']
    if row.band is not None:
        left, right = axis.at(row.band[0]), axis.at(row.band[1])
        width = round(right - left, 2)
        parts.append(f'<rect class="band" x="{left}" y="{from_y}" width="{width}" height="{to_y - from_y}"/>')
    for kind, value in (*(("grid", tick) for tick in axis.ticks), ("level", none)):
        x = axis.at(value)
        parts.append(f'<line class="{kind}" x1="{x}" x2="{x}" y1="{from_y}" y2="{to_y}"/>')
    parts.append(_whisker(axis.at(row.low), axis.at(row.high), y))
    parts.append(
        f'<g class="c1"><circle cx="{axis.at(row.estimate)}" cy="{y}" r="4.5" fill="currentColor">'
        f"<title>{escape(text)}</title></circle></g>"
    )
    return parts
