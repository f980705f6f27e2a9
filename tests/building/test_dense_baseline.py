"""Engines against their twins without sparse kernels: built for real, timed by a stand-in for the card."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_export.building import build
from sparse_export.building.dense_baseline import time_in_child
from sparse_export.engines import tensorrt_import
from sparse_export.errors import EngineBuildFailed, MissingCapability, UsageError
from sparse_export.formats.bundle import Bundle, open_bundle
from sparse_export.formats.engines import EngineInfo
from sparse_export.formats.layers import read_engine_times
from sparse_export.formats.run import Run
from sparse_export.inspect import inspect
from sparse_export.runtimes.layer_times import TimedLayers, time_layers
from sparse_export.runtimes.tensorrt import profiler
from sparse_export.signature import Signature
from tests.cli.conftest import Call
from tests.exporting import exported_once
from tests.making_runs import digits_run

pytestmark = [pytest.mark.tensorrt, pytest.mark.usefixtures("rtx")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with exported_once():
        yield digits_run(tmp_path_factory.mktemp("twin") / "run")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a GPU, for whoever asks whether engines can be timed."""
    monkeypatch.setattr("sparse_export.building.request.require_timeable", lambda options: None)


def _made_up(
    engines: Mapping[str, Path], fact: EngineInfo, signature: Signature, sizes: Mapping[str, int]
) -> dict[str, TimedLayers]:
    """Times of digits-cnn: the engine with sparse kernels runs its hidden Linear in half the time."""
    assert all(path.stat().st_size for path in engines.values())
    generator = np.random.default_rng(0)

    def once(ms: float) -> list[tuple[str, float]]:
        noise = generator.normal(1, 0.005, 2)
        return [("node_linear", ms * noise[0]), ("copy", 0.01 * noise[1])]

    return time_layers(
        {name: partial(once, 0.5 if name == "sparse" else 1.0) for name in engines},
        batch=sizes["batch"],
        rounds=20,
        block_s=1e-3,
        warmup_limit_s=0.05,
    )


def _bundle_with_two_kinds(run: Run, stand_in: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """Of a library whose engines differ by a byte where sparse kernels are allowed."""
    stand_in.write_text(
        f"{stand_in.read_text()}"
        "_build = Builder.build_serialized_network\n"
        "def _told(self, network, config):\n"
        "    plan = bytes(memoryview(_build(self, network, config)))\n"
        "    return plan + b'!' if config.get_flag(BuilderFlag.SPARSE_WEIGHTS) else plan\n"
        "Builder.build_serialized_network = _told\n"
    )
    monkeypatch.setattr("sparse_export.building.dense_baseline.time_in_child", _made_up)
    return build(run.path, out, targets=["tensorrt"], time_layers=True)


def test_the_table_is_in_layers_json_and_every_round_beside_the_engine(
    run: Run, stand_in: Path, card: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = _bundle_with_two_kinds(run, stand_in, tmp_path / "bundle", monkeypatch)
    info = open_bundle(bundle.path).info
    (fact,) = info.engines
    (times,) = read_engine_times(bundle.path / "layers.json", fact.file)
    assert (times.batch, times.rounds) == (8, 20)
    linear = next(row for row in times.rows if row.sparse_layers == ("node_linear",))
    assert linear.outcome == "speed-up"
    assert linear.ratio == pytest.approx(2.0, rel=0.05)
    samples = f"{fact.file}.times.json"
    assert samples in info.files
    document = json.loads((bundle.path / samples).read_text())
    assert len(document["batches"]["8"]["sparse"]["node_linear"]) == 20


def test_inspect_shows_the_table(
    run: Run, stand_in: Path, card: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = _bundle_with_two_kinds(run, stand_in, tmp_path / "bundle", monkeypatch)
    text = str(inspect(bundle.path))
    assert "Batch 8, layer by layer" in text
    assert re.search(r"Speed-up: dense / sparse is (1\.9[5-9]|2\.0)", text)
    assert "all layers" in text


def test_an_engine_that_is_the_same_as_its_twin_is_told_so_and_not_timed(
    run: Run, card: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr("sparse_export.building.dense_baseline.time_in_child", never)
    bundle = build(run.path, tmp_path / "bundle", targets=["tensorrt-rtx"], time_layers=True)
    (fact,) = bundle.info.engines
    (times,) = read_engine_times(bundle.path / "layers.json", fact.file)
    assert times.rows == ()
    assert "byte for byte" in times.note
    assert times.note in " ".join(str(inspect(bundle.path)).split())


def test_a_timing_that_fails_costs_nothing_else(
    run: Run, stand_in: Path, card: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any) -> Any:
        raise EngineBuildFailed("It crashed.")

    monkeypatch.setattr(f"{__name__}._made_up", crash)
    out = tmp_path / "bundle"
    with pytest.raises(EngineBuildFailed, match=r"It crashed.*has all the other targets"):
        _bundle_with_two_kinds(run, stand_in, out, monkeypatch)
    info = open_bundle(out).info
    assert info.targets == ("onnx", "tensorrt")
    assert read_engine_times(out / "layers.json", info.engines[0].file) == ()


def test_without_a_card_the_command_ends_with_5_and_writes_nothing(
    run: Run, tmp_path: Path, call: Call
) -> None:
    if tensorrt_import.gpu() is not None:
        pytest.skip("this machine has a card")
    out = tmp_path / "bundle"
    result = call("build", run.path, "--out", out, "--target", "tensorrt-rtx", "--time-layers")
    assert (result.exit_code, out.exists()) == (5, False)
    assert "no CUDA device" in result.stderr


def test_layers_of_no_engine_cannot_be_timed(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no engine is built"):
        build(run.path, tmp_path / "bundle", time_layers=True)


def _fact(bundle: Bundle, target: tensorrt_import.Target) -> EngineInfo:
    return replace(bundle.info.engines[0], target=target)


def test_the_process_that_times_says_why_it_could_not_and_its_crash_is_told(
    run: Run, stand_in: Path, tmp_path: Path
) -> None:
    if tensorrt_import.gpu() is not None:
        pytest.skip("this machine has a card")
    bundle = build(run.path, tmp_path / "bundle", targets=["tensorrt-rtx"])
    engines = {"dense": bundle.path / bundle.info.engines[0].file}
    with pytest.raises((EngineBuildFailed, MissingCapability), match="cannot load"):
        time_in_child(engines, _fact(bundle, "tensorrt-rtx"), bundle.info.signature, {"batch": 8})
    stand_in.write_text(f"import os\n{stand_in.read_text()}def Runtime(*_): os.abort()\n")
    with pytest.raises(EngineBuildFailed, match="was ended by SIGABRT"):
        time_in_child(engines, _fact(bundle, "tensorrt"), bundle.info.signature, {"batch": 8})


def test_the_profiler_passes_on_what_the_library_reports() -> None:
    told: list[tuple[str, float]] = []
    library = tensorrt_import.library("tensorrt-rtx")
    made = profiler(library, lambda name, ms: told.append((name, ms)))
    assert isinstance(made, library.IProfiler)
    made.report_layer_time("conv1 + relu1", 0.25)
    assert told == [("conv1 + relu1", 0.25)]
