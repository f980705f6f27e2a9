"""The report tells what the comparison found, in words too, and loads nothing."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from re import DOTALL, findall

import pytest

from sparse_export.formats.bundle import RunReference
from sparse_export.formats.engines import EngineInfo
from sparse_export.formats.layers import EngineTimes, LayerTiming
from sparse_export.formats.score import Score
from sparse_export.inspection import InspectedEngine
from sparse_export.instruments.paired_scores import ScoreDifference
from sparse_export.report import pictures, tables, write_report
from sparse_export.report.page import page as page_of
from sparse_export.report.side import side_of
from sparse_export.report.verdict import verdict
from tests.report.conftest import Made

TITLES = [
    *("Difference in accuracy", "Size and work", "Speed-up", "Time of a call", "Throughput against latency"),
    *("Density of each layer", "Training loss", "Validation accuracy", "Mask churn"),
]


class _Parts(HTMLParser):
    """Addresses in a page, and its elements by name."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.elements: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]


@pytest.fixture(scope="module")
def page(made: Made, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert write_report(path, made.comparison, made.dense, made.sparse) == path
    return path.read_text()


def drawings(page: str) -> list[ET.Element]:
    return [ET.fromstring(text) for text in findall(r"<svg.*?</svg>", page, DOTALL)]


def titles(page: str) -> list[str]:
    return [drawing.findtext("{http://www.w3.org/2000/svg}title", "") for drawing in drawings(page)]


def test_every_picture_is_there_and_says_in_words_what_it_shows(page: str, made: Made) -> None:
    assert titles(page) == TITLES
    told = {title: one.get("aria-label", "") for title, one in zip(TITLES, drawings(page), strict=True)}
    assert made.comparison.difference is not None
    assert f"{made.comparison.difference.amount:+.2f} points" in told["Difference in accuracy"]
    assert f"sparse {made.comparison.sparse.n_nonzero:,}" in told["Size and work"]
    for at in made.comparison.latency:
        assert f"batch {at.batch}: {at.ratio.estimate:.3f}x" in told["Speed-up"]
    for layer in made.sparse.info.layers:
        assert f"{layer.name} {layer.density:.3g}" in told["Density of each layer"]
    assert told["Mask churn"] == "Mask churn: sparse from 10 to 5 over 2 epochs."


def test_nothing_is_loaded_and_nothing_runs(page: str) -> None:
    parts = _Parts()
    parts.feed(page)
    assert parts.addresses == []
    assert not {"script", "img", "link", "iframe", "object"} & set(parts.elements)
    assert """content="default-src 'none'; style-src 'unsafe-inline'">""" in page


def test_the_folders_and_the_commands_are_told_as_text(page: str, made: Made) -> None:
    assert escape(str(made.sparse.path)) in page
    assert "onerror=alert(1)&gt;" in page
    assert "sparse trained" in page
    assert made.comparison.versions["onnx"] in page


def test_the_table_has_every_layer_and_why_hardware_cannot_use_it(page: str, made: Made) -> None:
    for layer in made.sparse.info.layers:
        assert f'<td class="text">{layer.name}</td>' in page
    assert "<b>float32</b>" in page
    assert "The bundle has no engine" in page


def test_a_run_that_is_gone_is_told_and_has_no_curves(made: Made, tmp_path: Path) -> None:
    gone = replace(
        made.sparse, info=replace(made.sparse.info, run=RunReference(path="/nowhere", run_sha256="0" * 64))
    )
    dense = replace(made.dense, info=replace(made.dense.info, run=gone.info.run))
    path = write_report(tmp_path / "report.html", made.comparison, dense, gone)
    text = path.read_text()
    assert titles(text) == TITLES[:6]
    assert "sparse: The run /nowhere is no longer there." in text


def test_a_run_that_is_another_one_is_told_and_not_shown(made: Made) -> None:
    other = replace(made.sparse, info=replace(made.sparse.info, run=made.dense.info.run))
    wrong = replace(other, info=replace(other.info, run=replace(other.info.run, run_sha256="0" * 64)))
    side = side_of("sparse", wrong)
    assert side.run is None
    assert "is not the run" in (side.missing or "")


def test_the_verdict_is_one_sentence_with_the_figures(made: Made) -> None:
    text = verdict(made.comparison)
    d, ratio = made.comparison.difference, made.comparison.latency[0].ratio
    assert d is not None
    density = made.sparse.info.density
    assert text.startswith(f"At density {density:.3g} of its sparse layers the sparse network is ")
    assert f"batch 1 ({ratio.estimate:.3f}x [{ratio.low:.3f}, {ratio.high:.3f}])" in text
    assert f"({d.amount:+.2f} points [{d.low:+.2f}, {d.high:+.2f}])" in text
    assert text.endswith(" of the bytes, with 95 % intervals in brackets.")
    assert ". " not in text


def test_the_verdict_names_each_outcome_and_a_gate_that_failed(made: Made) -> None:
    first, second = made.comparison.latency
    mixed = replace(
        made.comparison,
        latency=(replace(first, outcome="speed-up"), replace(second, outcome="slow-down")),
        gate_failed="The sparse accuracy is too low.",
        difference=None,
        score_source="recorded",
    )
    text = verdict(mixed)
    assert "is faster at batch 1 (" in text
    assert "but is slower at batch 8 (" in text
    assert "% as recorded" in text
    assert text.endswith("which fails what was required: The sparse accuracy is too low.")


def test_a_comparison_without_accuracies_has_a_page_too(made: Made, tmp_path: Path) -> None:
    nothing = replace(
        made.comparison,
        dense=replace(made.comparison.dense, score=None, nonzero_macs=None),
        sparse=replace(made.comparison.sparse, score=None),
        difference=None,
        drop=None,
        score_source=None,
    )
    text = write_report(tmp_path / "report.html", nothing, made.dense, made.sparse).read_text()
    assert titles(text) == TITLES[1:]
    assert "score, not measured" in text


def test_times_of_layers_are_shown_where_they_were_measured_and_not_denied(made: Made) -> None:
    side = side_of("sparse", made.sparse)
    assert "time of single layers was not measured" in page_of(made.comparison, side, side)
    row = LayerTiming(
        nodes=("conv<1>",),
        weights=(),
        dense_layers=("a",),
        sparse_layers=("b",),
        dense_kernels=(),
        sparse_kernels=(),
        dense_ms=2.0,
        sparse_ms=1.0,
        ratio=2.0,
        low=1.9,
        high=2.1,
        floor=1.01,
        outcome="speed-up",
        verdict="faster",
    )
    times = EngineTimes(
        batch=8, rows=(row, replace(row, dense_ms=None, ratio=None)), whole=None, rounds=20, steady=True
    )
    engine = InspectedEngine(fact=engine_fact(), layers=(), times=(times,))
    timed = replace(side, inspection=replace(side.inspection, engines=(engine,)))
    comparison = replace(made.comparison, passed_over={"tensorrt": "it is not installed"})
    text = page_of(comparison, timed, timed)
    assert "time of single layers was not measured" not in text
    assert "conv&lt;1&gt;" in text
    assert "2.000 [1.900, 2.100]" in text
    assert "passed over: tensorrt" in text
    assert "it is not installed" in text


def engine_fact() -> EngineInfo:
    return EngineInfo(
        file="engines/x.engine",
        target="tensorrt",
        version="10.13.0",
        precision="fp16",
        gpu="a card",
        architecture="sm90",
        architectures=(),
        hardware="none",
        version_compatible=False,
        profiles=({"batch": (1, 8, 8)},),
        sparse=True,
        parse_s=1.0,
        build_s=1.0,
        onnx_sha256="0" * 64,
        timing_cache=None,
    )


def test_the_score_of_another_task_has_its_own_name_and_direction(made: Made) -> None:
    def rmse(value: float) -> Score:
        return Score(name="RMSE", value=value, n_samples=400, higher_is_better=False, is_share=False)

    comparison = replace(
        made.comparison,
        dense=replace(made.comparison.dense, score=rmse(1.07)),
        sparse=replace(made.comparison.sparse, score=rmse(1.138)),
        difference=ScoreDifference(amount=0.068, low=0.05, high=0.08, n_samples=400, n_resamples=10_000),
    )
    assert "has RMSE 1.138 against 1.07, lower is better (+0.068 [+0.05, +0.08])" in verdict(comparison)
    assert "RMSE (lower is better), measured" in tables.figures(comparison)
    assert "paired 95 % interval; lower is better." in pictures.score(comparison)
    assert "RMSE, lower is better" in str(comparison) and "ccuracy" not in str(comparison)
    side = side_of("dense", made.dense)
    assert side.run is not None
    drawn = "".join(pictures.training([replace(side, run=replace(side.run, test=rmse(1.07)))]))
    assert "Validation RMSE" in drawn and "ccuracy" not in drawn
    assert "the test set is no part of; lower is better." in drawn
