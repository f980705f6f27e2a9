"""How pruning is shown as it goes: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest

from sparse_export.cli._progress import _LayerBar, layer_observer
from sparse_export.oneshot.costs import LayerDone
from sparse_export.oneshot.report import SparsifiedLayer


def done(name: str, number: int, share: float, *, resumed: bool = False) -> LayerDone:
    layer = SparsifiedLayer(
        name=name,
        shape=(4, 4),
        n_weights=16,
        n_active=8,
        pattern="2:4",
        reason="",
        magnitude=1.0,
        kept_in_order=None,
        kept_share=0.5,
        error=None,
    )
    return LayerDone(layer=layer, number=number, n_layers=4, share=share, resumed=resumed)


def left(bar: _LayerBar) -> str:
    return str(bar._progress.tasks[0].fields["left"])


def test_the_time_left_goes_by_the_work_that_is_done_and_not_by_the_count_of_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    bar = _LayerBar()
    try:
        for number, share in ((1, 0.01), (2, 0.02)):
            bar(done(f"resumed{number}", number, share, resumed=True))
            assert left(bar) == ""
        now = 20.0
        bar(done("small", 3, 0.12))
        assert left(bar) == "2:56 left"  # a tenth took 20 s
        assert bar._progress.tasks[0].completed == 0.12
        assert bar._progress.tasks[0].fields["layer"] == "3 of 4: small"
        bar(done("large", 4, 1.0))
        assert bar._progress.finished
    finally:
        bar.close()


def test_a_terminal_gets_a_bar_and_a_file_a_line_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with layer_observer() as observer:
        observer(done("[red]first", 1, 0.25))
        observer(done("second", 2, 0.5))
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", terminal.getvalue())
    assert "prune" in text and "1 of 4: [red]first" in text and "25 %" in text
    plain = io.StringIO()
    monkeypatch.setattr(sys, "stderr", plain)
    with layer_observer() as observer:
        observer(done("first", 1, 0.25))
        observer(done("second", 2, 0.5))
    assert plain.getvalue() == "1 of 4: first\n2 of 4: second\n"
