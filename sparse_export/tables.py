"""Tables and paragraphs for people, as values; rich draws them, measured to the width that there is."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console, JustifyMethod, RenderableType

__all__ = ["Shown", "Table", "count_text", "ms_text", "shape_text", "visible", "wrapped_for"]

PLAIN_WIDTH = 200
"""Columns where there is no terminal: so many that tables rarely have to wrap."""
_PARAGRAPH_WIDTH = 100
_LEAST_WIDTH = 40
_COMMON_WIDTH = 80
_UNBROKEN = 16  # pieces up to this length are broken only where columns are close together already
# Names are broken behind hyphens, slashes and dots, if at all; numbers and the "--" of options are not.
_BREAKS = re.compile(r"(?<=[^\s\-/_][-/_])(?=[^\s\-/_])|(?<=[^\s.,:][.,:])(?=[^\s\d.,:])")
# Control characters, and those that turn, hide or break text: direction marks, zero widths, separators.
_CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


def visible(text: str) -> str:
    """The text with characters that a terminal obeys or hides as escapes, but for tabs and line ends.

    Names come out of files of other people, and a terminal obeys what they hold.
    """
    return _CONTROLS.sub(lambda found: _escaped(ord(found[0])), text)


def _escaped(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells in columns, which wrap where the width does not suffice.

    Attributes:
        rows: of equal length, at least one.
        head: titles of the columns; () for a table without.
        right: numbers of the columns that are flush right.
        title: a line above it.
    """

    rows: Sequence[Sequence[str]]
    head: Sequence[str] = ()
    right: Sequence[int] = ()
    title: str = ""


@dataclass(frozen=True)
class Shown:
    """What a person is shown of a result: paragraphs and tables, a blank line between two of them.

    Attributes:
        parts: a string is a paragraph, or several on lines of their own. Text and cells are plain: neither
            rich's markup nor control characters in them are obeyed.
    """

    parts: Sequence[str | Table]

    def __add__(self, other: Shown) -> Shown:
        return Shown((*self.parts, *other.parts))

    def draw(self, width: int = PLAIN_WIDTH) -> str:
        """Draw without colour. Nothing is cut off, however narrow: cells and words are wrapped.

        Args:
            width: columns of the widest line.

        Returns:
            Lines without trailing spaces, and no line end after the last.
        """
        from rich.console import Console

        return self._drawn(Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False))

    def draw_for(self, stream: TextIO) -> str:
        """Draw for where the text goes: a terminal's own width and emphasis, else as `draw` does."""
        if not stream.isatty():
            return self.draw()
        from rich.console import Console

        return self._drawn(Console(file=stream))

    def _drawn(self, console: Console) -> str:
        console.width = max(console.width, _LEAST_WIDTH)
        with console.capture() as captured:
            for at, part in enumerate(self.parts):
                if at:
                    console.print()
                console.print(_renderable(part, console.width))
        return "\n".join(line.rstrip() for line in captured.get().removesuffix("\n").split("\n"))


def _renderable(part: str | Table, width: int) -> RenderableType:
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    if isinstance(part, str):
        return Text(_wrapped(visible(part), min(width, _PARAGRAPH_WIDTH)), overflow="fold")
    padding, widths = _layout(part, width)
    drawn = RichTable(box=None, padding=(0, padding, 0, 0), pad_edge=False, show_header=bool(part.head))
    for column, fixed in enumerate(widths):
        title = Text(_wrapped(visible(part.head[column]), fixed) if part.head else "", style="bold")
        justify: JustifyMethod = "right" if column in part.right else "left"
        drawn.add_column(title, justify=justify, overflow="fold", width=fixed)
    for row in part.rows:
        drawn.add_row(
            *(
                Text(_wrapped(visible(cell), fixed), overflow="fold")
                for cell, fixed in zip(row, widths, strict=True)
            )
        )
    return Group(Text(visible(part.title), style="bold", overflow="fold"), drawn) if part.title else drawn


def _layout(table: Table, width: int) -> tuple[int, list[int]]:
    """The space between columns, and their widths. Names are broken at their hyphens, dots and slashes before
    columns come closer, and within these pieces last, the longest first.
    """
    from rich.cells import cell_len

    rows = [*([table.head] if table.head else []), *table.rows]
    columns = [[visible(cell) for cell in column] for column in zip(*rows, strict=True)]
    whole = [max(cell_len(line) for cell in column for line in cell.split("\n")) for column in columns]
    words, pieces = (
        [max((cell_len(part) for cell in column for part in parts(cell)), default=0) for column in columns]
        for parts in (str.split, _pieces)
    )
    for padding, parts, shortest in ((2, words, width), (2, pieces, _UNBROKEN), (1, pieces, 1)):
        room = width - padding * (len(columns) - 1)
        if sum(whole) <= room:
            return padding, whole
        longest = max(parts, default=0)
        while longest > shortest and sum(min(part, longest) for part in parts) > room:
            longest -= 1
        least = [min(part, longest) for part in parts]
        if sum(least) <= room:
            break
    return padding, _shared(least, whole, room)


def _pieces(text: str) -> list[str]:
    return [piece for word in text.split() for piece in _BREAKS.split(word)]


def _wrapped(text: str, width: int) -> str:
    """The text in lines of at most that width: broken at spaces; a longer word behind hyphens, dots and
    slashes; a longer piece anywhere.
    """
    return "\n".join(line for one in text.split("\n") for line in _lines(one, max(width, 1)))


def _lines(text: str, width: int) -> list[str]:
    from rich.cells import cell_len, chop_cells

    if cell_len(text) <= width:
        return [text]
    lines: list[str] = []
    line = ""
    for space, word in re.findall(r"(\s*)(\S+)", text):
        if cell_len(line + space + word) <= width:
            line += space + word
            continue
        if cell_len(word) <= width:
            if line:
                lines.append(line)
            line = word
            continue
        line += space if line and cell_len(line + space) < width else ""
        for piece in _pieces(word):
            if cell_len(line + piece) > width and line.strip():
                lines.append(line.rstrip())
                line = ""
            *full, line = chop_cells(line + piece, width) or [""]
            lines += full
    return [*lines, line] if line else lines


def wrapped_for(stream: TextIO, text: str) -> str:
    """Wrap a text at the spaces where it goes to a terminal; words that are longer, as paths may be, stay
    whole. Else it is left as it is.
    """
    if not stream.isatty():
        return text
    import textwrap

    width = max(_columns(stream), _LEAST_WIDTH)
    return "\n".join(
        textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False, drop_whitespace=True)
        for line in text.split("\n")
    )


def _columns(stream: TextIO) -> int:
    """Of a terminal; $COLUMNS goes before what it says itself, 80 where it says nothing."""
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and int(given):
        return int(given)
    try:
        return os.get_terminal_size(stream.fileno()).columns or _COMMON_WIDTH
    except (OSError, ValueError):
        return _COMMON_WIDTH


def _shared(least: Sequence[int], most: Sequence[int], room: int) -> list[int]:
    """Widths between least and most that take all the room: the narrowest columns get theirs first."""
    widths, left = list(least), max(0, room - sum(least))
    for n_after, column in enumerate(sorted(range(len(widths)), key=lambda at: most[at] - least[at])):
        given = min(most[column] - least[column], left // (len(widths) - n_after))
        widths[column] += given
        left -= given
    return widths


def count_text(n: int | None) -> str:
    """A count, `?` where it is not known."""
    return "?" if n is None else f"{n:,}"


def ms_text(ms: float | None) -> str:
    """Milliseconds in four digits, `-` where there are none."""
    return "-" if ms is None else f"{ms:.4g}"


def shape_text(shape: Sequence[int]) -> str:
    """A shape like `64x3x7x7`."""
    return "x".join(map(str, shape))
