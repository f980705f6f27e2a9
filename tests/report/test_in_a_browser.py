"""The report in a real browser, at the width of a desk and of a phone."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparse_export.report import write_report
from tests.report.browser import Browser, Tab, browser_program
from tests.report.conftest import Made

WIDTHS = {"desk": (1280, 900), "phone": (375, 800)}
# Whatever reaches beyond the right edge and is not inside a box that scrolls by itself.
TOO_WIDE = """[...document.querySelectorAll('body *')].filter(one => !one.closest('.wide')
  && one.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(one => one.outerHTML.slice(0, 200))"""
TOO_WIDE_DRAWING = """[...document.querySelectorAll('svg text')].filter(one => {
  const text = one.getBoundingClientRect(), drawing = one.ownerSVGElement.getBoundingClientRect();
  return text.right > drawing.right + 1 || text.left < drawing.left - 1 || text.bottom > drawing.bottom + 1; })
  .map(one => one.textContent)"""
SCROLLING = """[...document.querySelectorAll('.wrap')].filter(one => one.scrollWidth > one.clientWidth)
  .map(one => one.textContent.slice(0, 100))"""
BOXES = """[...document.querySelectorAll('figure svg')].map(one => { const box = one.getBoundingClientRect();
  return [box.width, box.height]; })"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = browser_program()
    if program is None:
        pytest.skip("no Chromium is installed")
    with Browser(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(
        tmp_path_factory.mktemp("page") / "report.html", made.comparison, made.dense, made.sparse
    )


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("where", WIDTHS)
def test_the_page_is_whole_fits_and_asks_for_nothing(
    where: str, dark: bool, browser: Browser, page: Path
) -> None:
    width, height = WIDTHS[where]
    tab = Tab(browser, page, width=width, height=height, dark=dark)
    assert tab.requested == [page.as_uri()]
    assert tab.complaints == []
    boxes = tab.value(BOXES)
    assert len(boxes) == 9
    assert all(wide > 200 and high > 40 for wide, high in boxes)
    assert tab.value("document.documentElement.scrollWidth") <= width
    assert tab.value(TOO_WIDE) == []
    assert tab.value(TOO_WIDE_DRAWING) == []
    assert tab.value(SCROLLING) == []
    picture = pixels(tab.screenshot())
    assert picture.shape[0] > height
    assert (picture[0, 0].mean() < 60) == dark  # the background
    assert len(np.unique(picture.reshape(-1, 3)[::7], axis=0)) > 50


def test_the_browser_would_tell_of_a_fault(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "faulty.html"
    path.write_text(
        "<!doctype html><title>x</title><script>console.error('no'); missing()</script>"
        "<img src='http://localhost:9/x.png'><div style='width:2000px'>wide</div>"
    )
    tab = Tab(browser, path, width=375, height=800)
    assert len(tab.complaints) >= 2
    assert "http://localhost:9/x.png" in tab.requested
    assert tab.value(TOO_WIDE) != []
