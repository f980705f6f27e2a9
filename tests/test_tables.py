from __future__ import annotations

import io
import re
from typing import Any

import pytest

from sparse_export.tables import (
    PLAIN_WIDTH,
    Shown,
    Table,
    count_text,
    ms_text,
    shape_text,
    visible,
    wrapped_for,
)

LAYERS = Table(
    title="Batch 1",
    head=("layer", "op", "shape", "density", "promised", "2:4", "eligible", "why not"),
    rows=[
        (
            "features.3.block.0.weight" * 4,
            "Conv",
            "64x3x7x7",
            "0.5000",
            "2:4",
            "yes",
            "no",
            "depthwise, vector",
        )
    ],
    right=(3,),
)
SHOWN = Shown(["A paragraph of many words. " * 10, LAYERS, Table(rows=[("path", "/a/very/long/path" * 20)])])


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _characters(text: str) -> list[str]:
    return sorted(re.sub(r"\s", "", text))


@pytest.mark.parametrize("width", [40, 80, 132])
def test_nothing_is_cut_off_however_narrow(width: int) -> None:
    text = SHOWN.draw(width)
    assert max(map(len, text.splitlines())) <= width
    assert _characters(text) == _characters(SHOWN.draw(10_000))


def test_a_table_that_fits_has_one_line_for_each_row() -> None:
    lines = Shown([LAYERS]).draw().splitlines()
    assert [line.split()[0] for line in lines] == ["Batch", "layer", LAYERS.rows[0][0]]


def test_columns_are_aligned_and_numbers_are_flush_right() -> None:
    table = Table(head=("name", "n"), rows=[("a", "1"), ("bcdef", "1,000")], right=(1,))
    assert Shown([table]).draw() == "name       n\na          1\nbcdef  1,000"


def test_names_are_broken_at_their_joints_and_numbers_and_options_are_not() -> None:
    rows = [("sparse-momentum-best", "features.3.block.weight", "1,234,567"), ("x", "y", "--max-drop")]
    table = Table(head=("method", "layer", "option"), rows=rows)
    assert Shown([table]).draw(44).splitlines() == [
        "method          layer             option",
        "sparse-         features.3.       1,234,567",
        "momentum-best   block.weight",
        "x               y                 --max-drop",
    ]


def test_a_text_for_a_terminal_is_wrapped_at_spaces_and_a_path_stays_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    path = "/a/" + "long-name/" * 5
    text = wrapped_for(_Terminal(), f"Error: there is no such option --max-drop\nwrote {path}")
    assert text.splitlines() == ["Error: there is no such option", "--max-drop", "wrote", path]
    assert wrapped_for(io.StringIO(), "a " * 100) == "a " * 100


def test_what_is_no_terminal_gets_no_colour_and_a_fixed_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert SHOWN.draw_for(io.StringIO()) == SHOWN.draw(PLAIN_WIDTH)
    assert "\x1b" not in SHOWN.draw()


def test_a_terminal_has_its_own_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = SHOWN.draw_for(_Terminal())
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert text != plain  # headings are bold
    assert max(map(len, plain.splitlines())) <= 80
    assert _characters(plain) == _characters(SHOWN.draw(10_000))


@pytest.mark.parametrize(
    "name", ["[red]fc[/red]", "[link=file:///etc]fc[/link]", ":warning:", "[/]", "a\\[b]"]
)
def test_markup_in_a_name_is_text(name: str) -> None:
    shown = Shown([name, Table(title=name, head=(name,), rows=[(name,)])])
    assert shown.draw() == f"{name}\n\n" + "\n".join([name] * 3)
    assert "\x1b]8" not in shown.draw_for(_Terminal())


def test_control_characters_in_a_name_are_escaped() -> None:
    hostile = "fc\x1b[31m\x07\r\x9b2J"
    shown = Shown([hostile, Table(title=hostile, head=(hostile,), rows=[(hostile,)])])
    assert shown.draw().split() == [visible(hostile)] * 4
    assert visible("a\tb\n") == "a\tb\n"


def test_lines_of_a_cell_and_of_a_paragraph_stay_lines() -> None:
    assert Shown(["one\ntwo", Table(rows=[("a", "b\nc")])]).draw() == "one\ntwo\n\na  b\n   c"


def test_what_is_shown_is_put_one_below_the_other() -> None:
    assert (Shown(["a"]) + Shown(["b"])).draw() == "a\n\nb"
    assert Shown([]).draw() == ""


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (count_text(None), "?"),
        (count_text(1234567), "1,234,567"),
        (ms_text(None), "-"),
        (ms_text(0.123456), "0.1235"),
        (shape_text((64, 3, 7, 7)), "64x3x7x7"),
        (shape_text(()), ""),
    ],
)
def test_figures_in_words(found: Any, wanted: str) -> None:
    assert found == wanted


@pytest.mark.parametrize("mark", ["\u202e", "\u200b", "\u2028", "\ufeff", "\u2066"])
def test_marks_that_turn_or_hide_text_are_shown_as_escapes(mark: str) -> None:
    assert visible(f"fc1{mark}.weight") == f"fc1\\u{ord(mark):04x}.weight"
