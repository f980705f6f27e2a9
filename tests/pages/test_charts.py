"""Charts are XML, draw what they are given where it belongs, and leave out what cannot be drawn."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from sparse_export.pages.charts import WIDTH, Point, Series, line_chart


def test_a_chart_is_xml_and_leaves_out_what_cannot_be_drawn() -> None:
    series = [
        Series(name="a < b", points=[Point(x=0.01, y=90.0, half_width=0.5), Point(x=0.1, y=95.0)]),
        Series(name="nan", points=[Point(x=0.0, y=90.0), Point(x=0.1, y=float("nan"))]),
    ]
    drawing = ET.fromstring(
        line_chart(series, title="t & t", x_label="density", y_label="%", log_x=True, level=series[0])
    )
    circles = list(drawing.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(circles) == 2
    places = [(float(circle.get("cx", "0")), float(circle.get("cy", "0"))) for circle in circles]
    assert places[0][0] < places[1][0]
    assert places[0][1] > places[1][1]
    assert "nothing to draw" in line_chart([], title="none", x_label="x", y_label="y")


@pytest.mark.parametrize("y", [0.0, 98.2])
def test_a_chart_of_a_single_point_has_room_around_it(y: float) -> None:
    drawing = ET.fromstring(
        line_chart([Series(name="one", points=[Point(x=3.0, y=y)])], title="t", x_label="x", y_label="y")
    )
    (circle,) = list(drawing.iter("{http://www.w3.org/2000/svg}circle"))
    assert 58 < float(circle.get("cx", "0")) < WIDTH - 14
    assert 16 < float(circle.get("cy", "0")) < 216
