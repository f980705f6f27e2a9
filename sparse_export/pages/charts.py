"""Line charts as SVG text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sparse_export.pages.escaping import escape

# The width of a phone, where a unit of the drawing is a pixel, so that text stays readable; larger screens
# enlarge it.
WIDTH = 380
_LEFT, _RIGHT, _TOP = 58, 14, 16
_PLOT_HEIGHT = 200
_BOTTOM = _TOP + _PLOT_HEIGHT
_LEGEND = 58  # from the bottom of the plot to the first line of the legend
_LINE = 17
_LABEL_GAP = 44  # least distance of two labels along the x axis
N_COLOURS = 7  # classes c0 to c6 of `document`
_MANY_POINTS = 20  # of a line, from where on its dots are small
_DASHES = ("", "6 3", "2 3")


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of a line.

    Attributes:
        x: on the horizontal axis.
        y: on the vertical axis.
        half_width: of an interval around y, None for none.
    """

    x: float
    y: float
    half_width: float | None = None


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line.

    Attributes:
        name: in the legend.
        points: from left to right.
        colour: its number, None for its index among the series.
    """

    name: str
    points: Sequence[Point]
    colour: int | None = None


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    level: Series | None = None,
    alt: str = "",
) -> str:
    """Draw lines with a legend below; each point shows its values under the pointer.

    Points that are not finite are left out, and on a logarithmic axis those at or below 0.

    Args:
        series: the lines.
        title: of the drawing.
        x_label: below the horizontal axis.
        y_label: beside the vertical axis.
        log_x: the horizontal axis is logarithmic.
        log_y: the vertical axis is logarithmic.
        level: of one point, drawn as a line across.
        alt: see `drawing`.

    Returns:
        SVG, or a paragraph where there is nothing to draw.
    """
    series = [
        replace(one, points=[point for point in one.points if _is_drawable(point, log_x, log_y)])
        for one in series
    ]
    points = [point for one in series for point in one.points]
    levels = list(level.points[:1]) if level is not None else []
    if not points:
        return f"<p>{escape(title)}: nothing to draw yet.</p>"
    reach = [
        value
        for point in [*points, *levels]
        for value in (point.y - (point.half_width or 0), point.y + (point.half_width or 0))
        if value > 0 or not log_y
    ]
    x_axis = Axis([point.x for point in points], _LEFT, WIDTH - _RIGHT, log=log_x)
    y_axis = Axis(reach, _BOTTOM, _TOP, log=log_y, round_ticks=True)
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts = [
        *_grid(x_axis, y_axis),
        f'<text x="{middle}" y="{_BOTTOM + 36}" text-anchor="middle">{escape(x_label)}</text>',
        (
            f'<text transform="translate(12 {(_TOP + _BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
            f"{escape(y_label)}</text>"
        ),
    ]
    for point in levels:
        parts += _level(point, y_axis, level.name if level is not None else "")
    for n, one in enumerate(series):
        parts += _line(one, n, x_axis, y_axis)
    return drawing(parts, height=_BOTTOM + _LEGEND + _LINE * (len(series) - 1) + 8, title=title, alt=alt)


def drawing(parts: Sequence[str], *, height: float, title: str, alt: str = "") -> str:
    """Join the parts of a drawing.

    Args:
        parts: SVG elements, drawn `WIDTH` wide.
        height: of the drawing.
        title: of the drawing.
        alt: what it shows, in words, for screen readers; the title where it is empty.

    Returns:
        SVG.
    """
    return "\n".join(
        [
            (
                f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(alt or title)}" '
                'xmlns="http://www.w3.org/2000/svg">'
            ),
            f"<title>{escape(title)}</title>",
            *parts,
            "</svg>",
        ]
    )


def _is_drawable(point: Point, log_x: bool, log_y: bool) -> bool:
    """Is it finite, and positive on logarithmic axes?"""
    on_log = (log_x and point.x <= 0) or (log_y and point.y <= 0)
    return math.isfinite(point.x) and math.isfinite(point.y) and not on_log


class Axis:
    """Maps values to positions on the drawing.

    Args:
        values: that it has to show.
        start: position of the low end.
        end: position of the high end.
        log: logarithmic.
        round_ticks: ticks at round numbers also where a logarithmic axis has few values.
    """

    def __init__(
        self, values: Sequence[float], start: float, end: float, *, log: bool, round_ticks: bool = False
    ) -> None:
        self._log, self._start, self._end = log, start, end
        low, high = (self._scaled(value) for value in (min(values), max(values)))
        margin = 0.05 * (high - low) or 0.5
        self._low, self._high = low - margin, high + margin
        own = log and not round_ticks and len(set(values)) <= 10
        self.ticks = sorted(set(values)) if own else self._round_ticks()

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self._log else value

    def at(self, value: float) -> float:
        """Return the position of a value."""
        part = (self._scaled(value) - self._low) / (self._high - self._low)
        return round(self._start + part * (self._end - self._start), 2)

    def _round_ticks(self) -> list[float]:
        """Round numbers, about five of them; on a logarithmic axis powers of ten and their halves."""
        step = 10.0 ** math.floor(math.log10((self._high - self._low) / 4))
        step *= next(factor for factor in (1, 2, 5, 10) if (self._high - self._low) / (factor * step) <= 6)
        first = math.ceil(self._low / step)
        values = [n * step for n in range(first, math.floor(self._high / step) + 1)]
        return [10**value for value in values] if self._log else values


def _grid(x_axis: Axis, y_axis: Axis) -> list[str]:
    """The lines of both axes with their numbers."""
    left, right = _LEFT, WIDTH - _RIGHT
    parts = []
    for tick in y_axis.ticks:
        y = y_axis.at(tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 4}" text-anchor="end">{_short(tick)}</text>')
    labelled = -math.inf
    for tick in x_axis.ticks:
        x = x_axis.at(tick)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{_TOP}" y2="{_BOTTOM}"/>')
        if x - labelled >= _LABEL_GAP:
            parts.append(f'<text x="{x}" y="{_BOTTOM + 16}" text-anchor="middle">{_short(tick)}</text>')
            labelled = x
    return parts


def _short(value: float) -> str:
    """A number of an axis: 12000 as 12k, 3400000 as 3.4M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:.4g}"


def _level(point: Point, y_axis: Axis, name: str) -> list[str]:
    """A line across, with its band."""
    left, right, y = _LEFT, WIDTH - _RIGHT, y_axis.at(point.y)
    half = point.half_width or 0.0
    top, bottom = y_axis.at(point.y + half), y_axis.at(point.y - half)
    text = f"{name}: {_value(point)}"
    return [
        f'<rect class="band" x="{left}" y="{top}" width="{right - left}" height="{round(bottom - top, 2)}"/>',
        (
            f'<line class="level" x1="{left}" x2="{right}" y1="{y}" '
            f'y2="{y}"><title>{escape(text)}</title></line>'
        ),
        f'<text x="{right - 2}" y="{y - 4}" text-anchor="end">{escape(name)}</text>',
    ]


def _line(series: Series, n: int, x_axis: Axis, y_axis: Axis) -> list[str]:
    """A line with its points and its entry in the legend."""
    colour = n if series.colour is None else series.colour
    dash = _DASHES[colour // N_COLOURS % len(_DASHES)]
    places = " ".join(f"{x_axis.at(point.x)},{y_axis.at(point.y)}" for point in series.points)
    style = 'stroke="currentColor" stroke-width="1.8"' + (f' stroke-dasharray="{dash}"' if dash else "")
    parts = [f'<g class="c{colour % N_COLOURS}">', f'<polyline points="{places}" fill="none" {style}/>']
    radius = 2.6 if len(series.points) <= _MANY_POINTS else 1.2
    for point in series.points:
        x, y = x_axis.at(point.x), y_axis.at(point.y)
        if point.half_width:
            low, high = y_axis.at(point.y - point.half_width), y_axis.at(point.y + point.half_width)
            parts.append(f'<line x1="{x}" x2="{x}" y1="{low}" y2="{high}" stroke="currentColor"/>')
        text = f"{series.name}, {point.x:g}: {_value(point)}"
        parts.append(
            f'<circle cx="{x}" cy="{y}" r="{radius}" '
            f'fill="currentColor"><title>{escape(text)}</title></circle>'
        )
    legend = _BOTTOM + _LEGEND + _LINE * n
    parts.append(f'<line x1="{_LEFT}" x2="{_LEFT + 20}" y1="{legend - 4}" y2="{legend - 4}" {style}/>')
    parts.append(f'</g><text x="{_LEFT + 26}" y="{legend}">{escape(series.name)}</text>')
    return parts


def _value(point: Point) -> str:
    """The value of a point with its interval."""
    return f"{point.y:.4g}" + (f" ± {point.half_width:.2g}" if point.half_width else "")
