"""How pruning is shown as it goes: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest

from sparse_export.cli._bar import progress_line
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


def test_the_time_left_goes_by_the_work_that_is_done_and_not_by_the_count_of_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    bar = _LayerBar()
    try:
        for number, share in ((1, 0.01), (2, 0.02)):
            bar(done(f"resumed{number}", number, share, resumed=True))
            assert "0:00 so far" in bar._bar.line().plain
        now = 20.0
        bar(done("small", 3, 0.12))
        assert bar._bar.line().plain.endswith(" 12 %  2:56 left  3 of 4: small")  # a tenth took 20 s
        now = 80.0
        assert "1:56 left" in bar._bar.line().plain  # it goes on while a layer takes its time
        bar(done("large", 4, 1.0))
        assert "100 %  0:00 left" in bar._bar.line().plain
    finally:
        bar.close()


LINE = ("two-four", 0.5, "1:02:03 left", ("loss 0.001", "validation accuracy 100.00 %", "62.7 steps/s"))


@pytest.mark.parametrize("width", range(40, 130))
def test_a_line_of_progress_fits_and_always_has_the_time_left(width: int) -> None:
    line = progress_line(*LINE, width=width)
    assert len(line) <= width
    assert re.match(r"two-four ━+─+  50 %  1:02:03 left", line)
    told = line.split("left  ")[-1].split("  ") if "left  " in line else []
    assert told == list(LINE[3][: len(told)])  # whole pieces, the first ones
    assert len(told) == 3 or width < 105


def test_the_name_of_a_layer_keeps_its_end_where_there_is_no_room() -> None:
    pieces = ("12 of 148: encoder.layer.11.attention.output.dense.weight",)
    line = progress_line("prune", 0.1, "0:10 left", pieces, width=60)
    assert line == "prune ━───────  10 %  0:10 left  …ention.output.dense.weight"
    assert progress_line("prune", 0.1, "0:10 left", pieces, width=60, ascii_only=True).isascii()


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
