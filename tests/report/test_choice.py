"""The report shows how `sparsify` chose the layers of a run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from sparse_export.formats.score import Score
from sparse_export.oneshot.choice import Choice, CurvePoint, LayerChoice
from sparse_export.report.page import page as page_of
from sparse_export.report.side import BundleSide, side_of
from tests.report.conftest import Made


def test_how_layers_were_chosen_is_drawn_with_what_may_be_lost(made: Made) -> None:
    known = side_of("sparse", made.sparse)
    assert "How its layers were chosen" not in _content(made, known)
    dense, sparse = Score(n_correct=95, n_samples=100), Score(n_correct=94, n_samples=100)
    choice = Choice(
        max_drop="2",
        allowed=2.0,
        held_back="validation samples",
        n_searched=100,
        dense=dense,
        sparse=sparse,
        weights="last walk",
        saving="multiply-adds",
        share=0.75,
        share_of_all=0.7,
        n_samples=8,
        change="change",
        layers=(LayerChoice(name="fc1.weight", saving=10.0, change=0.1, sparse=True),),
        curve=(
            CurvePoint(share=0.0, n_layers=0, score=95.0, lost=0.0, in_order=True),
            CurvePoint(share=1.0, n_layers=2, score=90.0, lost=5.0, in_order=True),
        ),
        n_scores=3.0,
        seconds=1.0,
    )
    assert known.run is not None
    report = Path(made.sparse.info.run.path) / "sparsify.json"
    report.write_text(json.dumps({"choice": asdict(choice)}))
    try:
        told = side_of("sparse", made.sparse)
        assert told.choice == choice
        drawn = _content(made, told)
        report.write_text(json.dumps({"choice": {"of": "another version"}}))
        assert side_of("sparse", made.sparse).choice is None
    finally:
        report.unlink()
    assert "How its layers were chosen" in drawn
    assert "accuracy of sets of layers by their share of multiply-adds: 0.0 % 95; 100.0 % 90." in drawn
    assert (
        "at most 2 points may be lost. Chosen: 75.0 %, accuracy 94.00 % against 95.00 % dense on 100 others."
        in drawn
    )


def _content(made: Made, sparse: BundleSide) -> str:
    return page_of(made.comparison, side_of("dense", made.dense), sparse)
