"""Precisions and runtimes, validated: a real bundle with an engine, other runtimes played by onnxruntime."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from sparse_export.building import build
from sparse_export.engines import tensorrt_import
from sparse_export.engines.options import PRECISIONS, Precision
from sparse_export.engines.precision import TOLERANCE
from sparse_export.engines.tensorrt_import import Gpu
from sparse_export.errors import GateFailed, MissingCapability, UnknownNameError, UsageError
from sparse_export.evaluate.validate import validate
from sparse_export.evaluate.validation import check_gates
from sparse_export.files import sha256_file
from sparse_export.formats.bundle import Bundle
from sparse_export.formats.run import Run
from sparse_export.inspect import inspect
from sparse_export.runtimes import Session
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.runtimes.tolerance import differences
from sparse_export.signature import Array, Feeds
from tests.cli.conftest import Call
from tests.exporting import exported_once
from tests.making_runs import digits_accuracy, digits_fact, network_and_masks, save_run

pytestmark = [pytest.mark.tensorrt, pytest.mark.usefixtures("rtx")]
VALIDATING: Any = sys.modules["sparse_export.evaluate.validate"]
ENGINE = "engines/tensorrt-rtx-int8-sm89.engine"


@pytest.fixture(scope="module", autouse=True)
def _exported_once() -> Iterator[None]:
    with exported_once():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    module, masks = network_and_masks(density=0.4)
    folder = tmp_path_factory.mktemp("across") / "run"
    return save_run(folder, module, masks, fact=digits_fact(), test=digits_accuracy(module))


@pytest.fixture(scope="module")
def int8(run: Run, rtx: None) -> Bundle:
    from sparse_export.engines.options import EngineOptions

    options = EngineOptions(target="tensorrt-rtx", architectures=("sm89",))
    return build(
        run.path, run.path.with_name("int8"), targets=["tensorrt-rtx"], precision="int8", engines=[options]
    )


class Played:
    """A session that takes eight samples at most, and is off by a little or a lot."""

    max_batch = 8

    def __init__(self, bundle: Bundle, offset: float) -> None:
        self.name = "tensorrt-rtx"
        self._session: Session = open_session(bundle.onnx_path)
        self.signature = self._session.signature
        self._offset = offset
        self.sizes: set[int] = set()

    def run(self, feeds: Feeds) -> dict[str, Array]:
        assert self.signature.n_samples(feeds) <= self.max_batch
        return {name: y + np.float32(self._offset) for name, y in self._session.run(feeds).items()}

    def close(self) -> None:
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _play(monkeypatch: pytest.MonkeyPatch, offset: float) -> None:
    monkeypatch.setattr(VALIDATING, "open_runtime", lambda bundle, name, **_: Played(bundle, offset))


def test_int8_is_calibrated_on_the_training_data_and_near_the_network(int8: Bundle) -> None:
    assert (int8.info.precision, int8.info.n_calibration) == ("int8", 256)
    found = validate(int8)
    assert found.parity is not None
    assert found.parity.ok
    assert found.parity.max_relative_difference > 1e-5
    check_gates(found)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_passes_the_gates_and_a_wrong_answer_none(
    precision: Precision, run: Run, tmp_path: Path
) -> None:
    bundle = build(run.path, tmp_path / "b", precision=precision, n_calibration=64)
    found = validate(bundle)
    check_gates(found)
    assert bundle.info.n_parameters == 40_394
    assert bundle.info.rtol == TOLERANCE[precision]
    assert found.parity is not None
    assert 0 < found.parity.max_relative_difference < TOLERANCE[precision] / 2
    wanted = np.load(bundle.path / "golden" / "output.npy")
    for wrong in (np.roll(wanted, 1, axis=1), -wanted, np.zeros_like(wanted)):
        (one,) = differences({"y": wrong}, {"y": wanted}, atol=bundle.info.atol, rtol=bundle.info.rtol)
        assert not one.ok


def test_packed_int8_is_the_same_bundle_for_validation(run: Run, int8: Bundle, tmp_path: Path) -> None:
    """Nothing of this network is 2:4, so that there is nothing to pack, and that is said."""
    with pytest.raises(GateFailed, match="No weight can be packed"):
        build(run.path, tmp_path / "b", precision="int8", onnx="packed")


def test_calibration_needs_data(run: Run, tmp_path: Path) -> None:
    module, masks = network_and_masks(density=0.4)
    nameless = save_run(tmp_path / "run", module, masks)
    with pytest.raises(UsageError, match="names no data set"):
        build(nameless.path, tmp_path / "b", precision="int8")
    with pytest.raises(UsageError, match="3 samples are too few"):
        build(run.path, tmp_path / "b", precision="int8", n_calibration=3)
    assert not (tmp_path / "b").exists()


def test_without_a_gpu_the_engine_is_named_as_not_run_with_the_reason(
    int8: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_import, "gpu", lambda: None)
    found = validate(int8)
    assert found.runtimes == ()
    assert "no CUDA device" in found.not_run["tensorrt-rtx"]
    assert "not run: " in str(found)


def test_an_engine_from_elsewhere_is_run_when_its_digest_is_given_and_else_it_is_told(
    int8: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(tensorrt_import, "gpu", lambda: Gpu(name="a card", architecture="sm89"))
    _play(monkeypatch, 0.0)
    digest = sha256_file(int8.path / "manifest.json")
    found = validate(int8, trust="0" * 64)
    assert (found.runtimes, list(found.not_run)) == ((), ["tensorrt-rtx"])
    assert f"--trust {digest}" in str(found)
    run_digest = sha256_file(Path(int8.info.run.path) / "run.json")
    assert [one.name for one in validate(int8, trust=[run_digest, digest]).runtimes] == ["tensorrt-rtx"]


def test_a_runtime_that_is_asked_for_and_cannot_work_ends_with_5(
    int8: Bundle, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    monkeypatch.setattr(tensorrt_import, "gpu", lambda: None)
    with pytest.raises(MissingCapability):
        validate(int8, runtimes=["tensorrt-rtx"])
    with pytest.raises(UnknownNameError):
        validate(int8, runtimes=["tensorflow"])
    assert call("validate", int8.path, "--runtime", "onnxruntime-cuda").exit_code == 5


def test_another_runtime_is_held_against_the_cpu_on_every_sample(
    int8: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    _play(monkeypatch, 0.0)
    found = validate(int8, runtimes=["tensorrt-rtx"])
    (result,) = found.runtimes
    assert result.parity is not None
    assert (result.parity.n_samples, result.parity.max_abs_difference) == (400, 0.0)
    assert result.score == found.score
    check_gates(found)


def test_what_a_runtime_made_of_the_bundle_is_held_against_the_dense_one_too(
    int8: Bundle, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = build(run.path, tmp_path / "b")
    _play(monkeypatch, 0.0)
    found = validate(int8, against=plain.path, runtimes=["tensorrt-rtx"])
    (result,) = found.runtimes
    assert result.against is not None
    assert result.against == found.against  # the same answers
    assert result.drop == found.drop
    assert str(found).count("McNemar p") == 2


@pytest.mark.parametrize(
    ("lost", "against", "passes"), [(0.9, 0.9, True), (1.1, 0.9, False), (0.9, 1.1, False)]
)
def test_accuracy_that_a_runtime_lost_fails_the_gate_when_the_file_itself_lost_none(
    lost: float,
    against: float,
    passes: bool,
    int8: Bundle,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = build(run.path, tmp_path / "b")
    _play(monkeypatch, 0.0)
    found = validate(int8, against=plain.path, max_drop=1.0, runtimes=["tensorrt-rtx"])
    (result,) = found.runtimes
    assert found.against is not None
    difference = replace(found.against.difference, amount=-against, low=-3.0, high=2.0)
    below = replace(found.against, drop=against, difference=difference)
    kept = replace(found.against, drop=0.0)
    drifted = replace(found, drop=0.0, against=kept, runtimes=(replace(result, drop=lost, against=below),))
    if passes:
        check_gates(drifted)
        return
    with pytest.raises(GateFailed, match=r"accuracy on tensorrt-rtx is 1\.10 points below"):
        check_gates(drifted)
    check_gates(replace(drifted, max_drop=None))


def test_a_runtime_that_computes_something_else_fails_the_gate(
    int8: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    _play(monkeypatch, 1e3)
    found = validate(int8, runtimes=["tensorrt-rtx"])
    assert not found.parity_ok
    with pytest.raises(GateFailed, match="golden pair on tensorrt-rtx"):
        check_gates(found)


def test_sparse_against_dense_has_mcnemars_test(int8: Bundle, run: Run, tmp_path: Path) -> None:
    plain = build(run.path, tmp_path / "b")
    found = validate(int8, against=plain.path)
    assert found.against is not None
    assert found.against.difference.mcnemar_p is not None
    assert 0 <= found.against.difference.mcnemar_p <= 1
    assert "McNemar" in str(found)


# ---- inspect


def test_inspect_shows_what_became_of_each_layer(int8: Bundle) -> None:
    found = inspect(int8.path)
    (engine,) = found.engines
    assert engine.fact.file == ENGINE
    assert len(engine.layers) == len(found.graph) == 5
    assert "Sparse kernels: 5 not eligible." in str(found)


def test_inspect_of_an_engine_tells_what_its_bundle_knows(int8: Bundle, call: Call) -> None:
    found = inspect(int8.path / ENGINE)
    assert (found.kind, found.problem) == ("engine", None)
    assert found.facts["header"] == f"tensorrt-rtx {tensorrt_import.version('tensorrt-rtx')}"
    assert found.engines[0].fact.file == ENGINE
    assert json.loads(call("inspect", int8.path / ENGINE, "--json").stdout)["kind"] == "engine"


def test_inspect_of_a_lone_engine_does_not_load_it(int8: Bundle, tmp_path: Path) -> None:
    content = (int8.path / ENGINE).read_bytes()
    lone = tmp_path / "x.plan"
    lone.write_bytes(content)
    assert inspect(lone).engines == ()
    lone.write_bytes(content[:-1])
    assert "its header tells of" in (inspect(lone).problem or "")
    lone.write_bytes(b"something else, of whatever kind it may be, and long enough for a header")
    assert "not loaded" in inspect(lone).facts["header"]


def test_inspect_of_an_empty_engine_ends_with_6(tmp_path: Path, call: Call) -> None:
    (tmp_path / "x.engine").touch()
    assert call("inspect", tmp_path / "x.engine").exit_code == 6
