from __future__ import annotations

import pytest

from sparse_export.errors import UsageError
from sparse_export.formats.score import Score
from sparse_export.instruments.paired_scores import ScoreDifference
from sparse_export.instruments.statistics import Mean
from sparse_export.tasks.scores import (
    capitalized,
    change_text,
    difference_text,
    drop_of,
    lost_too_much,
    mean_text,
    require_possible_drop,
    score_text,
    value_text,
)

FOUND = Score(n_correct=982, n_samples=1000)


def _difference(amount: float, low: float, high: float) -> ScoreDifference:
    return ScoreDifference(
        amount=amount, low=low, high=high, n_samples=1000, n_only_a=3, n_only_b=1, mcnemar_p=0.0389
    )


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (value_text(FOUND), "98.20 %"),
        (capitalized("accuracy of it"), "Accuracy of it"),
        (capitalized("mAP at IoU 0.5"), "mAP at IoU 0.5"),
        (value_text(None), "not measured"),
        (value_text(None, "-"), "-"),
        (score_text(FOUND), "98.20 % (982/1000)"),
        (score_text(None, "none"), "none"),
        (mean_text(Mean(mean=98.204, half_width=0.0749, n=3)), "98.20 ± 0.07"),
        (mean_text(Mean(mean=98.2, half_width=None, n=1)), "98.20"),
        (mean_text(Mean(mean=0.003141, half_width=0.000123, n=3), is_share=False), "0.003141 ± 0.000123"),
        (mean_text(None), "-"),
        (change_text(-0.2), "-0.20 points"),
        (change_text(0.0), "+0.00 points"),
        (change_text(-0.0021), "-0.002 points"),
        (difference_text(_difference(-0.2, -0.35, 0.049)), "-0.20 points [-0.35, +0.05]"),
        (
            difference_text(_difference(-0.2, -0.35, -0.05), p_value=True),
            "-0.20 points [-0.35, -0.05], McNemar p 0.0389",
        ),
    ],
)
def test_accuracies_in_words(found: str, wanted: str) -> None:
    assert found == wanted


def test_a_drop_is_the_reference_minus_the_accuracy() -> None:
    assert drop_of(FOUND, Score(n_correct=992, n_samples=1000)) == pytest.approx(1.0)
    assert drop_of(None, FOUND) is None
    assert drop_of(FOUND, None) is None


@pytest.mark.parametrize(
    ("lost", "allowed", "wanted"),
    [
        (1.0, 0.5, "accuracy is 1.00 points below the recorded one, more than 0.5"),
        (0.004, 0.0, "accuracy is 0.004 points below the recorded one, more than 0"),
        (0.5, 0.5, None),
        (0.5 + 1e-12, 0.5, None),  # what percentages round
        (-3.0, 0.0, None),
        (9.0, None, None),
        (None, 0.0, None),
    ],
)
def test_more_is_lost_than_may_be_only_beyond_rounding(
    lost: float | None, allowed: float | None, wanted: str | None
) -> None:
    assert lost_too_much("accuracy", lost, "the recorded one", allowed) == wanted


@pytest.mark.parametrize("bound", [-0.1, float("nan"), float("inf")])
def test_a_bound_that_is_no_bound_is_refused(bound: float) -> None:
    with pytest.raises(UsageError, match=f"allowed drop is {bound}"):
        require_possible_drop(bound)
    require_possible_drop(None)
    require_possible_drop(0.0)


def test_a_change_that_rounding_makes_is_no_change() -> None:
    assert change_text(-3.339e-08, is_share=False) == "-3.339e-08"
    assert change_text(-3.339e-08, is_share=False, of=1.07) == "0"
    assert change_text(-3.339e-04, is_share=False, of=1.07) == "-0.0003339"
    assert change_text(2e-7, of=97.0) == "+0.00 points"
    found = ScoreDifference(amount=-3e-08, low=-4e-08, high=0.002, n_samples=9)
    assert difference_text(found, is_share=False, of=1.07) == "0 [0, +0.002]"
