"""A line of progress that fits the terminal: name, bar, percent, time left, then what else has room."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparse_export.tables import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

__all__ = ["Bar", "duration", "progress_line"]

_LONG, _SHORT = 20, 8  # columns of the bar
_LEAST_CUT = 12  # columns below which a piece is left out rather than cut


class Bar:
    """A line at the foot of a terminal, written over as work goes on.

    Attributes:
        console: prints above the line.
    """

    def __init__(self, label: str) -> None:
        """Show nothing yet.

        Args:
            label: name of the work.
        """
        from rich.console import Console
        from rich.live import Live

        self.console: Console = Console(stderr=True)
        self._label = label
        self._share = 0.0
        self._left_s: float | None = None
        self._pieces: tuple[str, ...] = ()
        self._began = self._told = time.monotonic()
        self._live = Live(
            console=self.console, transient=True, get_renderable=self.line, refresh_per_second=5
        )

    def show(
        self, share: float, *, left_s: float | None = None, pieces: Sequence[str] = (), label: str = ""
    ) -> None:
        """Show how far it is.

        Args:
            share: that is done, from 0 to 1.
            left_s: seconds that it will still take; None where that is not known yet.
            pieces: what else is told, the most important first; those that find no room are left out.
            label: a new name of the work.
        """
        self._share, self._left_s, self._pieces = share, left_s, tuple(pieces)
        self._label = label or self._label
        self._told = time.monotonic()
        self._live.start(refresh=True)

    def line(self) -> Text:
        """The line as it is at this moment."""
        from rich.text import Text

        now = time.monotonic()
        if self._left_s is None:
            when = f"{duration(now - self._began)} so far"
        else:
            when = f"{duration(max(0.0, self._left_s - (now - self._told)))} left"
        ascii_only = self.console.options.ascii_only
        text = progress_line(
            self._label, self._share, when, self._pieces, width=self.console.width, ascii_only=ascii_only
        )
        return Text(text, no_wrap=True, overflow="crop")

    def close(self) -> None:
        """Remove it."""
        self._live.stop()


def progress_line(
    label: str, share: float, when: str, pieces: Sequence[str], *, width: int, ascii_only: bool = False
) -> str:
    """Lay a line of progress out.

    Args:
        label: name of the work.
        share: that is done, from 0 to 1.
        when: the time that is left.
        pieces: what else is told, the most important first. What finds no room beside a short bar is left
            out; of the first the beginning is cut, where the rest says enough.
        width: columns.
        ascii_only: draw the bar of # and -.
    """
    pieces = [visible(piece) for piece in pieces if piece]
    head, percent = f"{visible(label)} ", f" {100 * share:3.0f} %  {when}"
    for n in (_LONG, _SHORT):
        room = width - len(head) - n - len(percent)
        shown, left = [], room
        for piece in pieces:
            if len(piece) + 2 > left:
                break
            shown.append(piece)
            left -= len(piece) + 2
        if len(shown) == len(pieces):
            break
    if pieces and not shown and room - 2 >= _LEAST_CUT:
        ellipsis = "..." if ascii_only else "…"
        shown = [ellipsis + pieces[0][-(room - 2 - len(ellipsis)) :]]
    full, empty = "#-" if ascii_only else "━─"
    done = min(n, max(0, round(n * share)))
    return f"{head}{full * done}{empty * (n - done)}{percent}{''.join(f'  {piece}' for piece in shown)}"


def duration(seconds: float) -> str:
    """Like 2:56, or 1:02:56."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
