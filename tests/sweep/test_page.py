"""The page's chart of accuracy against density: which dense twin its line is, and what it is called."""

from __future__ import annotations

import re

import pytest

from sparse_export.instruments.statistics import Mean, mean_interval
from sparse_export.sweep.page import score_chart
from sparse_export.sweep.run_list import Setting
from sparse_export.sweep.table import Row


def mean(value: float | None) -> Mean | None:
    return None if value is None else mean_interval([value])


def row(
    method: str,
    test: float | None,
    validation: float | None = None,
    *,
    density: float | None = None,
    setting: Setting = (),
) -> Row:
    return Row(
        method=method,
        pattern=None,
        density=density,
        setting=setting,
        n_cells=1,
        n_complete=1,
        test=mean(test),
        validation=mean(validation),
        estimate_channels=None,
        estimate_macs=None,
        all_layers_estimate_channels=None,
        all_layers_estimate_macs=None,
        step_ms=None,
    )


def dense(momentum: float, test: float | None, validation: float | None) -> Row:
    return row("dense", test, validation, setting=(("optimizer.momentum", momentum),))


@pytest.mark.parametrize(
    ("rows", "line", "note"),
    [
        ([row("dense", 97.5, 96.0)], ["dense"], ""),
        ([dense(0.9, 97.5, 96.0)], ["dense, momentum 0.9"], ""),
        # The higher test accuracy is the other's: choosing by it would make it no test any more.
        (
            [dense(0.5, 97.5, 96.0), dense(0.9, 96.5, 97.0)],
            ["dense, momentum 0.9"],
            "best of 2 dense settings by val",
        ),
        (
            [dense(0.5, 97.5, None), dense(0.9, 96.5, None)],
            ["dense, momentum 0.5"],
            "best of 2 dense settings by test",
        ),
        (
            [dense(0.5, 97.5, None), dense(0.9, 96.5, 97.0)],
            ["dense, momentum 0.5"],
            "best of 2 dense settings by test",
        ),
        ([dense(0.5, None, None), dense(0.9, 96.5, 97.0)], ["dense, momentum 0.9"], ""),
        ([dense(0.5, None, None)], [], ""),
        ([], [], ""),
    ],
)
def test_the_dense_line_is_chosen_by_validation_and_called_by_its_setting(
    rows: list[Row], line: list[str], note: str
) -> None:
    chart = score_chart([*rows, row("set", 90.0, 91.0, density=0.1)])
    assert re.findall(r">([^<>]*dense[^<>]*)</text>", chart) == line
    drawing, _, below = chart.partition("</svg>")
    assert "best of" not in drawing
    if note:
        assert f"The line across is {line[0]}: the {note}" in below
    else:
        assert below == ""
