from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparse_export.artefact import open_bundle
from sparse_export.building import build
from sparse_export.errors import ArtefactError, MissingCapability, UnknownNameError, UsageError
from sparse_export.measure.latency import bench, runtimes_here, write_bench
from sparse_export.measure.machine import machine_facts
from tests.making_runs import digits_run

QUICK: dict[str, Any] = {"rounds": 20, "block_s": 0.001, "warmup_limit_s": 0.05, "n_threads": 1}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    return build(digits_run(folder / "run"), folder / "bundle").path


def test_every_batch_has_percentiles_throughput_and_its_own_floor(bundle: Path) -> None:
    found = bench(bundle, batches=(1, 16), runtimes=("onnxruntime-cpu",), **QUICK)
    assert [(row.runtime, row.batch) for row in found.rows] == [("onnxruntime-cpu", n) for n in (1, 16)]
    for row in found.rows:
        at = row.latency
        assert 0 < at.median_ms <= at.p90_ms
        assert row.samples_per_s == pytest.approx(1e3 * row.batch / at.mean_ms)
        assert row.latency_ms.low <= row.latency_ms.estimate <= row.latency_ms.high
        assert row.floor >= max(row.control.high, 1 / row.control.low) >= 1.0
        assert len(at.samples_ms) == len(row.again.samples_ms) == 20
    assert found.rows[1].samples_per_s > found.rows[0].samples_per_s


def test_the_table_names_what_was_measured_and_where(bundle: Path) -> None:
    found = bench(open_bundle(bundle), batches=(4,), runtimes=("onnxruntime-cpu",), **QUICK)
    text = str(found)
    assert "onnxruntime-cpu        4" in text
    assert f"{found.rows[0].latency.median_ms:.4g}" in text
    assert "threads: 1" in text
    assert str(found.machine["cpu_model"]) in " ".join(text.split())


def test_the_written_document_keeps_every_round(bundle: Path, tmp_path: Path) -> None:
    found = bench(bundle, batches=(2,), runtimes=("onnxruntime-cpu",), **QUICK)
    document = json.loads(write_bench(tmp_path, found).read_text())
    assert document["kind"] == "bench"
    assert document["rows"][0]["latency"]["samples_ms"] == list(found.rows[0].latency.samples_ms)
    assert document["machine"]["n_cores_usable"] == machine_facts()["n_cores_usable"]


def test_without_a_card_only_the_cpu_is_timed_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, wanted in (
        ([], ("onnxruntime-cpu",)),
        ([{"name": "NVIDIA H200"}], ("onnxruntime-cpu", "onnxruntime-cuda")),
    ):
        facts = {"gpus": gpus}
        monkeypatch.setattr("sparse_export.measure.latency.machine_facts", lambda facts=facts: facts)
        assert runtimes_here() == wanted


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"batches": ()}, UsageError, r"batch sizes are \(\)"),
        ({"batches": (4, 4)}, UsageError, r"\(4, 4\)"),
        ({"batches": (0,)}, UsageError, r"\(0,\)"),
        ({"runtimes": ("onnxruntime",)}, UnknownNameError, "onnxruntime-cpu"),
        ({"runtimes": ("onnxruntime-cpu",) * 2}, UsageError, "Each was expected once"),
        ({"rounds": 5}, UsageError, "5 rounds"),
        ({"n_threads": 0}, UsageError, "0 threads"),
    ],
)
def test_options_without_meaning_are_refused(
    options: dict[str, Any], error: type[Exception], named: str, bundle: Path
) -> None:
    with pytest.raises(error, match=named):
        bench(bundle, **(QUICK | options))


def test_a_runtime_that_this_machine_cannot_run_is_not_replaced(bundle: Path) -> None:
    if machine_facts()["gpus"]:
        pytest.skip("this machine has a card")
    with pytest.raises(MissingCapability, match="cuda"):
        bench(bundle, batches=(1,), runtimes=("onnxruntime-cuda",), **QUICK)


def test_a_changed_file_is_not_timed(bundle: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    with (copy / "model.onnx").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(ArtefactError, match="bytes"):
        bench(copy, **QUICK)
