"""The page's chart of accuracy against density: which dense twin its line is, and what it is called."""

from __future__ import annotations

import re

import pytest

from sparse_export.instruments.statistics import Mean, mean_interval
from sparse_export.sweep.page import _table, score_chart
from sparse_export.sweep.run_list import Setting
from sparse_export.sweep.table import Row, direction_text, shown


def mean(value: float | None) -> Mean | None:
    return None if value is None else mean_interval([value])


def row(
    method: str,
    test: float | None,
    validation: float | None = None,
    *,
    density: float | None = None,
    setting: Setting = (),
    score: tuple[str, bool, bool] = ("accuracy", True, True),
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
        score_name=score[0],
        is_share=score[1],
        higher_is_better=score[2],
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


RMSE = ("RMSE", False, False)


def test_the_score_is_named_its_direction_told_and_the_best_sparse_mean_marked() -> None:
    rows = [
        row("dense", 0.9, 1.0, score=RMSE),
        row("set", 1.138, 1.2, density=0.1, score=RMSE),
        row("rigl", 1.071, 1.3, density=0.1, score=RMSE),
    ]
    text = str(shown(rows))
    assert "test RMSE" in text and "validation RMSE" in text and "%" not in text
    assert "Of the RMSE lower is better; the best sparse mean is marked by *." in text
    assert "1.071 *" in text and "1.2 *" in text and text.count("*") == 3
    assert re.findall("<b>(.*?)</b>", _table(rows)) == ["1.2", "1.071"]
    assert "test RMSE" in score_chart(rows)


def test_the_dense_line_of_an_error_is_the_lowest_one() -> None:
    settings = [(("optimizer.momentum", momentum),) for momentum in (0.5, 0.9)]
    rows = [
        row("dense", test, setting=setting, score=RMSE)
        for test, setting in zip((1.0, 2.0), settings, strict=True)
    ]
    rows.append(row("set", 1.5, density=0.1, score=RMSE))
    assert re.findall(r">([^<>]*dense[^<>]*)</text>", score_chart(rows)) == ["dense, momentum 0.5"]


def test_of_different_scores_or_none_nothing_is_called_the_best() -> None:
    mixed = [row("set", 90.0, density=0.1), row("rigl", 1.0, density=0.1, score=RMSE)]
    assert "test score" in str(shown(mixed)) and "*" not in str(shown(mixed))
    assert direction_text(mixed, "bold").startswith("The rows have different scores")
    nothing = [row("set", None, density=0.1, score=("", True, True))]
    assert direction_text(nothing, "bold") == ""
    shares = [row("set", 90.0, density=0.1), row("rigl", 91.0, density=0.1)]
    assert "test accuracy %" in str(shown(shares)) and "91.00 *" in str(shown(shares))
