"""Several candidates against one dense network: one table, one page, and recall by class."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from sparse_export.errors import GateFailed, UsageError
from sparse_export.evaluate.candidates import METHOD, Candidates, check_gates, compare_candidates, names_of
from sparse_export.evaluate.per_class import losses_first
from sparse_export.report.candidates import candidates_page
from sparse_export.report.page import page
from sparse_export.report.side import side_of
from tests.report.conftest import Made


@pytest.fixture(scope="module")
def found(made: Made) -> Candidates:
    """The same sparse network under two names, once as if it had failed."""
    failed = replace(made.comparison, gate_failed="The sparse accuracy of 9 % is lower.", max_drop=1.0)
    return Candidates(names=("first", "second<b>"), comparisons=(made.comparison, failed))


def test_the_table_has_a_column_for_each_network_and_says_how_they_were_timed(found: Candidates) -> None:
    text = found.shown().draw()
    header = next(line for line in text.splitlines() if line.split()[:1] == ["dense"] and "first" in line)
    assert header.split() == ["dense", "first", "second<b>"]
    assert METHOD in " ".join(text.split())
    assert text.count("dense / sparse time") == len(found.comparisons[0].latency)
    assert "FAILED: second<b>: The sparse accuracy of 9 % is lower." in text
    assert found.document["candidates"].keys() == {"first", "second<b>"}


def test_every_candidate_has_to_keep_the_requirement(found: Candidates, made: Made) -> None:
    with pytest.raises(GateFailed, match=r"^second<b>: The sparse accuracy"):
        check_gates(found)
    check_gates(Candidates(names=("a", "b"), comparisons=(made.comparison, made.comparison)))


def test_a_page_of_candidates_has_a_card_and_a_place_in_each_chart_for_all(
    found: Candidates, made: Made
) -> None:
    sides = [replace(side_of("sparse", made.sparse), name=name) for name in found.names]
    html = candidates_page(found, side_of("dense", made.dense), sides)
    assert "<script" not in html and "second<b>" not in html
    cards = re.findall(r'<section class="card (\w+)"><h2>([^<]+)</h2>', html)
    assert [title for _, title in cards] == ["first", "second&lt;b&gt;"]
    assert cards[1][0] == "bad"
    for chart in ("Score against speed", "Difference in accuracy", "Size and work", "Speed-up at batch 8"):
        drawn = next(svg for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL) if chart in svg)
        assert "first" in drawn and "second&lt;b&gt;" in drawn, chart
    assert METHOD.split(".")[0] in html


def test_the_recall_of_the_classes_adds_up_to_the_score(made: Made) -> None:
    classes, comparison = made.comparison.classes, made.comparison
    assert [one.number for one in classes] == list(range(10))
    n = np.array([one.n_samples for one in classes])
    for side, shares in (
        (comparison.dense, [one.dense_percent for one in classes]),
        (comparison.sparse, [one.sparse_percent for one in classes]),
    ):
        assert side.score is not None
        assert (n * np.array(shares)).sum() / n.sum() == pytest.approx(side.score.figure)
    for one in classes:
        assert one.difference.low <= one.difference.amount <= one.difference.high
        assert one.sparse_percent - one.dense_percent == pytest.approx(one.difference.amount)


def test_a_page_shows_the_largest_losses_of_a_class_first(made: Made) -> None:
    html = page(made.comparison, side_of("dense", made.dense), side_of("sparse", made.sparse))
    table = html[html.index("Score by class") :].split("</table>")[0]
    rows = re.findall(r'<tr><td class="text">(\d)</td>', table)
    assert rows == [one.name for one in losses_first(made.comparison.classes)]


def test_candidates_are_named_once_and_by_their_folders(made: Made) -> None:
    assert names_of([made.dense, made.sparse]) == (made.dense.path.name, made.sparse.path.name)
    with pytest.raises(UsageError, match="is given twice"):
        names_of([made.sparse, made.sparse])


def test_each_candidate_is_compared_with_the_same_dense_bundle(made: Made) -> None:
    asked: list[object] = []
    said: list[str] = []

    def compare(dense: object, sparse: object) -> object:
        asked.append((dense, sparse))
        return made.comparison

    found = compare_candidates(
        made.dense,
        [made.sparse, made.dense],
        compare,  # type: ignore[arg-type] # it needs no options
        runtime=None,
        on_progress=said.append,
    )
    assert asked == [(made.dense, made.sparse), (made.dense, made.dense)]
    assert len(found.comparisons) == len(said) == 2
