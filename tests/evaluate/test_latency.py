from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from sparse_export.building import build
from sparse_export.errors import ArtefactError, MissingCapability, UnknownNameError, UsageError
from sparse_export.evaluate.bench import bench
from sparse_export.evaluate.latency import write_bench
from sparse_export.formats.bundle import Bundle, GoldenInfo, open_bundle, save_bundle_info
from sparse_export.formats.engines import EngineInfo
from sparse_export.formats.listed import file_infos
from sparse_export.instruments.machine import machine_facts
from sparse_export.runtimes import Session
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.signature import Array, Feeds
from tests.card import Card, Stream, pretend_torch_cuda
from tests.engines.making import bundle_info
from tests.making_runs import digits_run
from tests.tagging import tagger_bundle

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
    row = next(line.split() for line in text.splitlines() if line.startswith("onnxruntime-cpu"))
    assert row[1] == "4"
    assert f"{found.rows[0].latency.median_ms:.4g}" in text
    assert "threads: 1" in text
    assert str(found.machine["cpu_model"]) in " ".join(text.split())


def test_the_written_document_keeps_every_round(bundle: Path, tmp_path: Path) -> None:
    found = bench(bundle, batches=(2,), runtimes=("onnxruntime-cpu",), **QUICK)
    document = json.loads(write_bench(tmp_path, found).read_text())
    assert document["kind"] == "bench"
    assert document["rows"][0]["latency"]["samples_ms"] == list(found.rows[0].latency.samples_ms)
    assert document["machine"]["n_cores_usable"] == machine_facts()["n_cores_usable"]


@pytest.mark.parametrize(
    ("card", "targets", "wanted"),
    [
        (False, (), ["onnxruntime-cpu"]),
        (True, (), ["onnxruntime-tensorrt", "onnxruntime-cuda", "onnxruntime-cpu"]),
        (False, ("tensorrt-rtx",), ["tensorrt-rtx", "onnxruntime-cpu"]),
    ],
)
def test_every_runtime_that_should_run_here_is_timed_by_default_and_a_failure_is_told(
    card: bool,
    targets: tuple[Any, ...],
    wanted: list[str],
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def opened(found: Bundle, name: str, **_: Any) -> Session:
        if name != "onnxruntime-cpu":
            raise MissingCapability(f"{name} does not work.", expected="More.", do="Mend it.")
        return open_session(found.onnx_path, n_threads=1)

    monkeypatch.setattr("sparse_export.runtimes.choice.gpu", lambda: "a card" if card else None)
    monkeypatch.setattr("sparse_export.evaluate.bench.open_runtime", opened)
    told: list[str] = []
    found = bench(_with_engines(bundle, targets), batches=(1,), **QUICK, on_progress=told.append)
    assert [*(one.runtime for one in found.not_timed), *(row.runtime for row in found.rows)] == wanted
    for one in found.not_timed:
        assert one.why == f"{one.runtime} does not work. Mend it."
        assert f"Not timed: {one.runtime}: {one.why}" in str(found)
        assert f"{one.runtime} is not timed: {one.why}" in told


def _with_engines(folder: Path, targets: tuple[Any, ...]) -> Bundle:
    bundle = open_bundle(folder)
    facts = tuple(
        EngineInfo(
            file=f"engines/{target}.engine",
            target=target,
            precision="fp32",
            version="1.7.1",
            gpu=None,
            architecture=None,
            architectures=(),
            hardware="none",
            version_compatible=False,
            profiles=({"batch": (1, 4, 8)},),
            sparse=True,
            parse_s=0.0,
            build_s=0.0,
            onnx_sha256="00" * 32,
        )
        for target in targets
    )
    return replace(bundle, info=replace(bundle.info, engines=facts))


class _Engine:
    """An engine's session, by onnxruntime: of one profile, for 4 to 8 samples."""

    name, max_batch = "tensorrt-rtx", 8

    def __init__(self, bundle: Bundle) -> None:
        self._session = open_session(bundle.onnx_path, n_threads=1)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        n = self._session.signature.n_samples(feeds)
        if not 4 <= n <= 8:
            raise UsageError(f"A batch of {n} fits no profile.", expected="4 to 8 were expected.")
        return self._session.run(feeds)

    def close(self) -> None:
        self._session.close()


def test_an_engine_is_timed_at_the_batches_that_it_has_a_profile_for(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sparse_export.evaluate.bench.open_runtime", lambda bundle, name, **_: _Engine(bundle)
    )
    engines = _with_engines(bundle, ("tensorrt-rtx",))
    found = bench(engines, batches=(1, 8), runtimes=("tensorrt-rtx",), **QUICK)
    (row,) = found.rows
    assert (row.runtime, row.file, row.batch) == ("tensorrt-rtx", "engines/tensorrt-rtx.engine", 8)
    (not_timed,) = found.not_timed
    assert (not_timed.runtime, not_timed.batch) == ("tensorrt-rtx", 1)
    assert "tensorrt-rtx at batch 1: A batch of 1 fits no profile." in " ".join(str(found).split())
    assert "tensorrt-rtx ran engines/tensorrt-rtx.engine." in str(found)
    with pytest.raises(UsageError, match=r"No batch .* could be timed.*A batch of 16 fits no profile"):
        bench(engines, batches=(16,), runtimes=("tensorrt-rtx",), **QUICK)


class _OnDevice(_Engine):
    """An engine whose passes can be launched by themselves; each takes a tenth of a call."""

    def launcher(self, feeds: Feeds) -> Callable[[], object]:
        return lambda: time.sleep(1e-4)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        time.sleep(1e-3)
        return super().run(feeds)


def test_an_engine_is_timed_on_its_device_too_where_that_can_be_said(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def opened(found: Bundle, name: str, *, cuda_graphs: bool, **_: Any) -> Session:
        asked.append(cuda_graphs)
        session: Any = (
            _OnDevice(found) if name == "tensorrt-rtx" else open_session(found.onnx_path, n_threads=1)
        )
        return session  # type: ignore[no-any-return]

    monkeypatch.setattr("sparse_export.evaluate.bench.open_runtime", opened)
    card = Card(capability=(8, 9))
    pretend_torch_cuda(monkeypatch, Stream(), card)
    engines = _with_engines(bundle, ("tensorrt-rtx",))
    runtimes = ("tensorrt-rtx", "onnxruntime-cpu")
    found = bench(engines, batches=(4,), runtimes=runtimes, cuda_graphs=True, **QUICK)
    engine, other = found.rows
    assert engine.device is not None
    assert engine.device_ms is not None
    assert len(engine.device.samples_ms) == 20
    assert 0.1 <= engine.device.median_ms < engine.latency.median_ms
    assert (other.device, other.device_ms) == (None, None)
    assert all(asked)
    text = " ".join(str(found).split())
    assert f"tensorrt-rtx at batch 4: {engine.device_ms.estimate:.4g} [" in text
    assert "Engines replayed CUDA graphs." in text


def test_a_network_with_two_inputs_is_timed_by_name(tmp_path: Path) -> None:
    bundle = tagger_bundle(tmp_path / "b")
    found = bench(bundle, batches=(1, 3), runtimes=("onnxruntime-cpu",), **QUICK)
    assert [(row.batch, row.latency.median_ms > 0) for row in found.rows] == [(1, True), (3, True)]
    assert found.sizes == {"sequence": 6}
    assert ", seed 0, sequence = 6; " in str(found).replace("\n", " ")


def test_a_network_without_a_batch_axis_is_timed_on_one_sample(tmp_path: Path) -> None:
    onnx.save(
        onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["" : 20]> g (float[1, 4] x) => (float[1, 4] y) { y = Tanh (x) }'
        ),
        tmp_path / "model.onnx",
    )
    with open_session(tmp_path / "model.onnx") as session:
        signature = session.signature
    assert signature.batch is None
    info = bundle_info(
        signature=signature,
        golden=GoldenInfo(inputs={}, outputs={}, inner={}),
        files=file_infos(tmp_path, ("model.onnx",)),
    )
    save_bundle_info(tmp_path, info)
    bundle = Bundle(path=tmp_path, info=info)
    found = bench(bundle, batches=(1, 8), runtimes=("onnxruntime-cpu",), **QUICK)
    assert [row.batch for row in found.rows] == [1]
    (other,) = found.not_timed
    assert other.why.endswith("takes one sample a call, and batch 8 was asked for.")


def test_cuda_graphs_of_no_engine_are_refused(bundle: Path) -> None:
    with pytest.raises(UsageError, match="onnxruntime-cpu replays none"):
        bench(bundle, batches=(1,), runtimes=("onnxruntime-cpu",), cuda_graphs=True, **QUICK)


def test_where_nothing_runs_every_reason_is_given(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(found: Bundle, name: str, **_: Any) -> Session:
        raise MissingCapability(f"{name} does not work.")

    monkeypatch.setattr("sparse_export.evaluate.bench.open_runtime", fail)
    with pytest.raises(MissingCapability, match="onnxruntime-cpu: onnxruntime-cpu does not work"):
        bench(bundle, batches=(1,), **QUICK)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"batches": ()}, UsageError, r"batch sizes are \(\)"),
        ({"batches": (4, 4)}, UsageError, r"\(4, 4\)"),
        ({"batches": (0,)}, UsageError, r"\(0,\)"),
        ({"runtimes": ("onnxruntime",)}, UnknownNameError, "onnxruntime-cpu"),
        ({"runtimes": ("onnxruntime-cpu",) * 2}, UsageError, "Each was expected once"),
        ({"runtimes": ("tensorrt",)}, UsageError, "no engine for tensorrt"),
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
