"""Bars are as long as their values, intervals lie where their ends are, and both keep their text."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_export.pages.bars import Bar, BarGroup, Interval, bar_chart, interval_chart
from sparse_export.pages.charts import WIDTH

SVG = "{http://www.w3.org/2000/svg}"


@given(values=st.lists(st.floats(0.0, 1e12), min_size=1, max_size=6))
def test_bars_of_a_group_are_in_proportion(values: list[float]) -> None:
    bars = [Bar(name=f"b{n}", value=value, text=f"{value:g}") for n, value in enumerate(values)]
    drawing = ET.fromstring(bar_chart([BarGroup(label="g & h", bars=bars)], title="t", alt="a < b"))
    lengths = [float(rect.get("width", "nan")) for rect in drawing.iter(f"{SVG}rect")]
    full = max(lengths)
    assert all(
        length == pytest.approx(full * value / (max(values) or 1.0), abs=0.02)
        for length, value in zip(lengths, values, strict=True)
    )
    assert drawing.get("aria-label") == "a < b"
    assert max(float(rect.get("x", "0")) + full for rect in drawing.iter(f"{SVG}rect")) < WIDTH


def test_a_value_that_is_no_number_is_written_and_not_drawn() -> None:
    bars = [
        Bar(name="a", value=1.0, text="one", low=0.5, high=2.0),
        Bar(name="b", value=float("nan"), text="none"),
    ]
    drawing = ET.fromstring(bar_chart([BarGroup(label="", bars=bars)], title="t", alt=""))
    assert len(list(drawing.iter(f"{SVG}rect"))) == 1
    assert len(list(drawing.iter(f"{SVG}path"))) == 1
    assert "none" in [text.text for text in drawing.iter(f"{SVG}text")]
    assert drawing.get("aria-label") == "t"


def test_a_long_name_is_cut_at_its_start() -> None:
    bars = [Bar(name="encoder.layers.encoder_layer_11.mlp.0.weight", value=1.0, text="1")]
    drawing = ET.fromstring(bar_chart([BarGroup(label="", bars=bars)], title="t", alt="", wide_names=True))
    name = next(drawing.iter(f"{SVG}text")).text or ""
    assert name.startswith("…")
    assert name.endswith("mlp.0.weight")


@given(
    low=st.floats(-100, 100),
    first=st.floats(0, 50),
    second=st.floats(0, 50),
    none=st.sampled_from([0.0, 1.0]),
)
def test_an_interval_lies_between_its_ends_and_all_is_inside(
    low: float, first: float, second: float, none: float
) -> None:
    row = Interval(
        label="r", estimate=low + first, low=low, high=low + first + second, text="x", band=(-1.0, 1.0)
    )
    drawing = ET.fromstring(interval_chart([row], none=none, title="t", x_label="x", alt="a"))
    (dot,) = drawing.iter(f"{SVG}circle")
    (whisker,) = drawing.iter(f"{SVG}path")
    start, end = (
        float(part.strip("MH").split()[0]) for part in (whisker.get("d") or "").split("M")[1].split("H")
    )
    assert 0 <= start <= float(dot.get("cx", "nan")) + 0.02 <= end + 0.04 <= WIDTH + 0.04
    (line,) = (one for one in drawing.iter(f"{SVG}line") if one.get("class") == "level")
    assert 0 <= float(line.get("x1", "nan")) <= WIDTH
