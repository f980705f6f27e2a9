"""The cards on top of a report say in words what their colour says, and claim no more than the intervals."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sparse_export.formats.score import Score
from sparse_export.instruments.paired_scores import ScoreDifference
from sparse_export.report.cards import Card, cards, cards_of, next_steps
from sparse_export.report.page import page as page_of
from sparse_export.report.side import side_of
from tests.report.conftest import Made


def card(title: str, found: tuple[Card, ...]) -> Card:
    return next(one for one in found if one.title == title)


def difference(low: float, high: float) -> ScoreDifference:
    return ScoreDifference(amount=(low + high) / 2, low=low, high=high, n_samples=400)


@pytest.mark.parametrize(
    ("low", "high", "word", "tone"),
    [
        (-0.4, 0.2, "not told apart from dense", "plain"),
        (-0.4, -0.1, "worse than dense", "bad"),
        (0.1, 0.3, "better than dense", "good"),
        (0.0, 0.3, "not told apart from dense", "plain"),
    ],
)
def test_a_score_is_better_or_worse_only_where_the_whole_interval_says_so(
    low: float, high: float, word: str, tone: str, made: Made
) -> None:
    up = replace(made.comparison, difference=difference(low, high))
    assert (card("Accuracy", cards_of(up)).word, card("Accuracy", cards_of(up)).tone) == (word, tone)


def test_of_an_error_less_is_better(made: Made) -> None:
    error = Score(n_samples=400, name="RMSE", value=0.2, higher_is_better=False, is_share=False)
    sides = {name: replace(getattr(made.comparison, name), score=error) for name in ("dense", "sparse")}
    found = card("RMSE", cards_of(replace(made.comparison, difference=difference(-0.3, -0.1), **sides)))
    assert found.word == "better than dense"
    assert found.figure == "0.2"
    assert "lower is better" in found.lines[0]


def test_speed_that_differs_between_batches_is_no_verdict(made: Made) -> None:
    first, second = made.comparison.latency
    mixed = (replace(first, outcome="speed-up"), replace(second, outcome="slow-down"))
    assert card("Speed", cards_of(replace(made.comparison, latency=mixed))).word == "depends on the batch"
    same = (replace(first, outcome="speed-up"), replace(second, outcome="speed-up"))
    found = card("Speed", cards_of(replace(made.comparison, latency=same)))
    assert (found.word, found.tone) == ("faster than dense", "good")
    assert found.lines[0].startswith(f"batch {first.batch}: {first.ratio.estimate:.3f}x [")


def test_what_was_required_passes_or_fails_with_its_clause(made: Made) -> None:
    assert card("Required", cards_of(made.comparison)).word == "nothing was required"
    passed = replace(made.comparison, max_drop="0.5")
    found = card("Required", cards_of(passed))
    assert (found.word, found.tone, found.lines) == ("passed", "good", ("at most 0.5 points may be lost",))
    assert found.figure == "1 of 1 kept"
    failed = card("Required", cards_of(replace(passed, gate_failed="It lost 3 <points>.")))
    assert (failed.word, failed.tone, failed.lines[-1]) == ("failed", "bad", "It lost 3 <points>.")
    page = cards(replace(passed, gate_failed="It lost 3 <points>."))
    assert "It lost 3 &lt;points&gt;." in page
    assert page.count('<section class="card') == 4


def test_a_smaller_file_is_said_to_be_smaller(made: Made) -> None:
    dense = replace(made.comparison.dense, size_bytes=1000)
    for n_bytes, word in ((500, "smaller"), (1001, "same size"), (2000, "larger")):
        sparse = replace(made.comparison.sparse, size_bytes=n_bytes)
        assert card("Size", cards_of(replace(made.comparison, dense=dense, sparse=sparse))).word == word


def test_commands_in_next_steps_are_set_as_code(made: Made) -> None:
    drawn = page_of(made.comparison, side_of("dense", made.dense), side_of("sparse", made.sparse))
    assert "<h2>What to do next</h2><ul><li>" in drawn
    assert "<code>build --compact</code>" in drawn


def test_next_steps_name_what_stands_in_the_way(made: Made) -> None:
    side = side_of("sparse", made.sparse)
    found = next_steps(made.comparison, side)
    assert any("zeros outside of 2:4" in text for text in found)
    at = replace(made.comparison.latency[0], outcome="not told apart")
    failed = replace(made.comparison, latency=(at,), gate_failed="It lost 3 points.", score_source="recorded")
    told = next_steps(failed, side)
    assert told[0].startswith("More was lost than may be.")
    assert any(f"batch {at.batch} were not told apart within" in text for text in told)
    assert told[-1].startswith("The score was not measured")
