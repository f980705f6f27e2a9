from __future__ import annotations

import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from sparse_export import trust
from sparse_export.engines import tensorrt_import
from sparse_export.errors import (
    ArtefactError,
    GateFailed,
    MissingCapability,
    NotTrustedError,
    SpeedupNotReached,
    UnknownNameError,
    UsageError,
)
from sparse_export.evaluate.compare import compare
from sparse_export.evaluate.compare_times import verdict_of_bundles
from sparse_export.evaluate.comparison import check_gates, write_results
from sparse_export.evaluate.evaluator import checked_samples
from sparse_export.files import sha256_file
from sparse_export.formats.bundle import (
    BUNDLE_FILE,
    Bundle,
    BundleInfo,
    GoldenInfo,
    RunReference,
    open_bundle,
    read_bundle_info,
    save_bundle_info,
)
from sparse_export.formats.engines import EngineInfo
from sparse_export.formats.listed import file_infos
from sparse_export.formats.run import DataInfo, LayerInfo, ModelInfo
from sparse_export.formats.score import Score
from sparse_export.instruments.card import CardLog, CardSample
from sparse_export.instruments.statistics import Ratio, log_location_interval
from sparse_export.report.verdict import verdict as verdict_of
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.signature import Array, Feeds, class_signature
from sparse_export.trust import TrustedDigests
from sparse_export.version import library_versions, now
from tests.card import Card, Stream, pretend_torch_cuda
from tests.instruments.test_statistics import (
    _common_drift,
    _independent,
    _outliers_in_one,
    _rho_06,
)
from tests.tagging import tagger_bundle

DATA = DataInfo(
    name="digits", mean=(0.0,), std=(1.0,), n_train=8, n_validation=4, n_test=4, test_sha256="ab" * 32
)
QUICK: dict[str, Any] = {
    "batches": (1,),
    "rounds": 20,
    "block_s": 0.001,
    "warmup_limit_s": 0.05,
    "n_threads": 1,
}
MakeBundle = Callable[..., Path]
OPENING: Any = sys.modules["sparse_export.evaluate.sessions"]


def _identity_with_noise(n: int, density: float) -> np.ndarray:
    """A weight (n, n) whose largest logit is at the largest input, mostly."""
    rng = np.random.default_rng(0)
    kept = rng.random((n, n)) < density
    weight: np.ndarray = np.eye(n) + 0.01 * rng.standard_normal((n, n)) * kept
    return weight.astype(np.float32)


@pytest.fixture
def make_bundle(tmp_path: Path) -> MakeBundle:
    def make(
        name: str,
        weights: list[np.ndarray],
        *,
        score: Score | None = None,
        data: DataInfo | None = DATA,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        names = [*(f"h{i}" for i in range(len(weights))), "logits"]
        names[0] = "x"
        graph = helper.make_graph(
            [helper.make_node("Gemm", [names[i], f"w{i}"], [names[i + 1]]) for i in range(len(weights))],
            "stack",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", len(weights[0])])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", weights[-1].shape[1]])],
            [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.save(model, folder / "model.onnx")
        (folder / "golden").mkdir()
        rest = ("golden/input.npy", "golden/output.npy", "layers.json")
        for other in rest:  # which a comparison without engines does not open
            (folder / other).write_bytes(b"")
        np.save(folder / "golden/input.npy", np.eye(8, len(weights[0]), dtype=np.float32))
        total, nonzero = sum(w.size for w in weights), sum(int(np.count_nonzero(w)) for w in weights)
        info = BundleInfo(
            method="test",
            model=ModelInfo(name="stack"),
            signature=class_signature((len(weights[0]),), weights[-1].shape[1], names=("x", "logits")),
            golden=GoldenInfo(
                inputs={"x": "golden/input.npy"}, outputs={"logits": "golden/output.npy"}, inner={}
            ),
            data=data,
            run=RunReference(path="runs/none", run_sha256="00" * 32),
            precision="fp32",
            targets=("onnx",),
            opset=20,
            ir_version=10,
            density=nonzero / total,
            layers=tuple(
                LayerInfo(
                    name=f"w{i}",
                    shape=w.shape,
                    n_weights=w.size,
                    n_active=int(np.count_nonzero(w)),
                    masked=True,
                )
                for i, w in enumerate(weights)
            ),
            n_parameters=total,
            n_nonzero=nonzero,
            macs=total,
            nonzero_macs=nonzero,
            score=score,
            atol=1e-4,
            rtol=1e-3,
            versions=library_versions(),
            command=("test",),
            created=now(),
            files=file_infos(folder, ["model.onnx", *rest]),
        )
        save_bundle_info(folder, info)
        trust.remember(sha256_file(folder / BUNDLE_FILE))
        return folder

    return make


@pytest.fixture
def pair(make_bundle: MakeBundle) -> tuple[Path, Path]:
    """The same shapes, dense and with nine of ten weights zero."""
    return (
        make_bundle("dense", [_identity_with_noise(16, 1.0)], score=Score(n_correct=98, n_samples=100)),
        make_bundle("sparse", [_identity_with_noise(16, 0.1)], score=Score(n_correct=97, n_samples=100)),
    )


def _samples(n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(1).standard_normal((n, 16), dtype=np.float32)
    return x, x.argmax(axis=1)


def test_a_comparison_reports_both_sides_as_their_manifests_and_files_say(pair: tuple[Path, Path]) -> None:
    dense, sparse = pair
    found = compare(open_bundle(dense), sparse, **QUICK)
    assert (found.dense.n_nonzero, found.sparse.n_nonzero) == (256, open_bundle(sparse).info.n_nonzero)
    assert found.dense.size_bytes == (dense / "model.onnx").stat().st_size
    assert found.sparse.density < 0.3 < found.dense.density == 1.0
    assert (found.sparse.macs, found.sparse.nonzero_macs) == (256, found.sparse.n_nonzero)
    assert (found.runtime, found.n_threads) == ("onnxruntime-cpu", 1)


def test_recorded_accuracies_are_called_recorded(pair: tuple[Path, Path]) -> None:
    found = compare(*pair, **QUICK)
    assert found.score_source == "recorded"
    assert found.difference is None
    assert found.drop == pytest.approx(1.0)
    assert "as recorded when the bundles were built" in " ".join(str(found).split())
    assert "-1.00 points" in str(found)


def test_accuracy_on_samples_is_measured_on_the_files(pair: tuple[Path, Path]) -> None:
    x, y = _samples()
    found = compare(*pair, samples=(x, y), **QUICK)
    weights = [
        numpy_helper.to_array(onnx.load(folder / "model.onnx").graph.initializer[0]).astype(np.float64)
        for folder in pair
    ]
    dense_right, sparse_right = ((x @ weight).argmax(axis=1) == y for weight in weights)
    assert found.score_source == "measured"
    assert found.dense.score == Score(n_correct=int(dense_right.sum()), n_samples=300)
    assert found.sparse.score == Score(n_correct=int(sparse_right.sum()), n_samples=300)
    assert found.difference is not None
    assert found.difference.n_only_a == int((dense_right & ~sparse_right).sum())
    assert found.difference.low <= found.difference.amount <= found.difference.high


def test_a_comparison_without_any_accuracy_says_so(make_bundle: MakeBundle) -> None:
    bundles = [make_bundle(name, [_identity_with_noise(8, 1.0)], data=None) for name in ("a", "b")]
    found = compare(*bundles, **QUICK)
    assert found.score_source is None
    text = " ".join(str(found).split())
    assert "agreement of outputs 100.00 % [100.00, 100.00], 95 % interval" in text
    assert "score not measured" not in text  # of networks without labels it is their agreement
    assert "a score that was not measured" in verdict_of(found)


@pytest.mark.timing
def test_the_free_sizes_that_were_timed_are_told(tmp_path: Path) -> None:
    dense, sparse = (tagger_bundle(tmp_path / name) for name in "ds")
    found = compare(dense, sparse, **QUICK)
    assert found.sizes == {"sequence": 6}
    assert ", seed 0, sequence = 6, 95 % intervals" in str(found).replace("\n", " ")


def test_less_work_in_other_shapes_is_a_speed_up(make_bundle: MakeBundle) -> None:
    dense = make_bundle("dense", [_identity_with_noise(512, 1.0) for _ in range(3)])
    sparse = make_bundle("sparse", [_identity_with_noise(512, 0.5)])
    found = compare(dense, sparse, **{**QUICK, "batches": (16,)}, require_speedup=1.2)
    at = found.latency[0]
    assert at.outcome == "speed-up"
    assert at.ratio.low > max(1.2, at.floor)
    assert at.verdict.startswith("Batch 16: speed-up of ")
    assert "same shapes" not in at.verdict
    check_gates(found)


@pytest.mark.timing
def test_more_work_is_called_a_slow_down(make_bundle: MakeBundle) -> None:
    dense = make_bundle("dense", [_identity_with_noise(512, 1.0)])
    sparse = make_bundle("sparse", [_identity_with_noise(512, 0.5) for _ in range(3)])
    at = compare(dense, sparse, **{**QUICK, "batches": (16,)}).latency[0]
    assert at.outcome == "slow-down"
    assert at.verdict.startswith("Batch 16: slow-down, sparse takes ")
    assert "differ in shape" in at.verdict


def test_two_precisions_are_told_apart_and_no_speed_up_can_be_required_of_them(
    pair: tuple[Path, Path],
) -> None:
    dense, sparse = (open_bundle(path) for path in pair)
    sparse = replace(sparse, info=replace(sparse.info, precision="int8"))
    found = compare(dense, sparse, **QUICK)
    assert (found.dense.precision, found.sparse.precision) == ("fp32", "int8")
    told = found.latency[0].verdict
    assert "The dense graph computes in fp32, the sparse one in int8" in told
    assert "zero" not in told
    assert "precision" in str(found)
    assert "sparse network in int8, against dense fp32," in verdict_of(found)
    with pytest.raises(UsageError, match="computes in int8, over") as caught:
        compare(dense, sparse, require_speedup=1.1, **QUICK)
    assert "--precision int8" in str(caught.value.do)


@pytest.mark.parametrize("kernels", [None, "it does not tell which layers it runs on them"])
def test_another_precision_is_never_credited_to_sparsity(kernels: str | None) -> None:
    facts = {"precisions": ("fp32", "fp16"), "on_sparse_kernels": kernels}
    outcome, told = _judge(_ratio(1.5, 1.6, 1.7), _ratio(0.99, 1.0, 1.01), **facts)
    assert outcome == "speed-up"
    assert "says nothing of sparsity alone" in told
    assert "2:4" not in told
    assert "same shapes" not in told


@pytest.mark.parametrize("gain", [1.0, 1.1])
@pytest.mark.parametrize("noise", [_independent, _rho_06, _common_drift, _outliers_in_one])
def test_noise_hardly_ever_makes_a_claim_and_a_gain_nearly_always_does(
    noise: Callable[[np.random.Generator, int], np.ndarray], gain: float
) -> None:
    """1,000 simulated comparisons of 24 rounds, by the rule that `compare` and `bench-train` speak by.

    dense, dense again and sparse have noise of their own, of which both ratios share that of dense. Without a
    gain no claim was made in any of the 4,000; a gain of 1.1 was claimed in 100 % with independent noise and
    with drift, in 99.0 with AR(1) of .6, and in 98.8 with outliers.
    """
    rng = np.random.default_rng(11)
    dense, again, sparse = (noise(rng, 24) / math.sqrt(2) for _ in range(3))
    ratios, controls = (
        log_location_interval(series, confidence=0.95)[:3]
        for series in (dense - sparse + math.log(gain), dense - again)
    )
    outcomes = []
    for i in range(len(dense)):
        ratio, control = (
            _ratio(*(math.exp(one[i]) for one in (low, middle, high)))
            for middle, low, high in (ratios, controls)
        )
        outcomes.append(_judge(ratio, control)[0])
    share = outcomes.count("speed-up") / len(outcomes)
    if gain == 1.0:
        assert share <= 0.01, share
        assert outcomes.count("slow-down") / len(outcomes) <= 0.01
    else:
        assert share >= 0.95, share


class _OnDevice:
    """A session whose passes can be launched by themselves: those of the first bundle take twice as long."""

    name, max_batch = "played", None

    def __init__(self, bundle: Bundle, slow: bool) -> None:
        self._session = open_session(bundle.onnx_path, n_threads=1)
        self._s = 4e-4 if slow else 2e-4

    def run(self, feeds: Feeds) -> dict[str, Array]:
        time.sleep(1e-3)
        return self._session.run(feeds)

    def launcher(self, feeds: Feeds) -> Callable[[], object]:
        return lambda: time.sleep(self._s)

    def close(self) -> None:
        self._session.close()


@pytest.mark.timing
def test_where_a_session_can_say_the_device_alone_is_timed_too(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = compare(*pair, **QUICK).latency[0]
    assert (plain.on_device, plain.device_ratio, plain.device_control) == ({}, None, None)
    dense, sparse = (open_bundle(path) for path in pair)
    monkeypatch.setattr(
        OPENING, "open_runtime", lambda side, name, **_: _OnDevice(side, slow=side.path == dense.path)
    )
    pretend_torch_cuda(monkeypatch, Stream(), Card(capability=(8, 9)))
    found = compare(dense, sparse, runtime="onnxruntime-cpu", **QUICK)
    (at,) = found.latency
    assert at.device_ratio is not None
    assert at.device_control is not None
    assert 1.5 < at.device_ratio.estimate < 2.2
    assert 0.8 < at.device_control.estimate < 1.25
    assert set(at.on_device) == {"dense", "dense again", "sparse"}
    assert at.outcome != "speed-up"  # which goes by the caller's time
    assert "on the device alone, ms" in str(found)


def test_cuda_graphs_go_with_engines_alone(pair: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="onnxruntime-cpu replays none"):
        compare(*pair, cuda_graphs=True, **QUICK)


def test_clocks_that_were_held_down_are_told(pair: tuple[Path, Path]) -> None:
    found = compare(*pair, **QUICK)
    card = CardSample(
        seconds=0.0,
        index=0,
        name="a card",
        sm_clock_mhz=900,
        max_sm_clock_mhz=1980,
        memory_clock_mhz=None,
        power_w=None,
        power_limit_w=None,
        temperature_c=None,
        throttle=("power-cap",),
    )
    assert "held down" not in str(found)
    held = replace(found, cards=CardLog(samples=[card]))
    assert "The card's clock was held down meanwhile: power-cap." in str(held)


def _ratio(low: float, estimate: float, high: float) -> Ratio:
    return Ratio(estimate=estimate, low=low, high=high, n_rounds=24, n_outliers=0, autocorrelation=0.0)


def _judge(ratio: Ratio, control: Ratio, **facts: Any) -> tuple[str, str]:
    facts = {"same_shapes": True, "has_zeros": True, "steady": True, **facts}
    found = verdict_of_bundles(batch=1, ratio=ratio, control=control, **facts)
    return found.outcome, found.text


def test_zeros_in_a_dense_graph_are_no_speed_up_and_the_verdict_says_why() -> None:
    outcome, verdict = _judge(_ratio(0.99, 1.0, 1.01), _ratio(0.99, 1.0, 1.02))
    assert outcome == "no difference"
    assert verdict.startswith("Batch 1: no speed-up; dense / sparse is 1.000 [0.990, 1.010]")
    assert "two copies of the dense file differ here by up to 2.0 %" in verdict
    assert "zeros do not make it faster" in verdict


@pytest.mark.parametrize("control", [_ratio(0.99, 1.03, 1.06), _ratio(0.94, 0.97, 1.01)])
def test_an_interval_above_one_is_no_speed_up_when_the_control_reaches_as_far(control: Ratio) -> None:
    assert _judge(_ratio(1.02, 1.05, 1.08), control)[0] == "not told apart"
    assert _judge(_ratio(0.93, 0.95, 0.98), control)[0] == "not told apart"
    assert _judge(_ratio(1.08, 1.10, 1.12), control)[0] == "speed-up"
    assert _judge(_ratio(0.88, 0.90, 0.92), control)[0] == "slow-down"


def test_a_speed_up_of_equal_shapes_is_not_credited_to_zeros() -> None:
    outcome, verdict = _judge(_ratio(1.1, 1.2, 1.3), _ratio(0.99, 1.0, 1.01))
    assert outcome == "speed-up"
    assert "speed-up of 1.200x [1.100, 1.300]" in verdict
    assert "does not come from skipped zeros" in verdict


def test_a_runtime_with_kernels_for_two_four_is_not_said_to_multiply_zeros() -> None:
    told = "of its layers 3 picked, 2 not picked"
    for times in ((1.1, 1.2, 1.3), (0.99, 1.0, 1.01), (0.7, 0.8, 0.9)):
        verdict = _judge(_ratio(*times), _ratio(0.99, 1.0, 1.01), on_sparse_kernels=told)[1]
        assert f"The runtime has kernels for 2:4: {told}." in verdict
        assert "skipped zeros" not in verdict
        assert "zeros do not make it faster" not in verdict


def test_a_slow_down_is_told_as_how_much_longer_sparse_takes() -> None:
    outcome, verdict = _judge(_ratio(0.4, 0.5, 0.8), _ratio(0.99, 1.0, 1.01))
    assert outcome == "slow-down"
    assert "sparse takes 2.000x as long [1.250, 2.500]" in verdict


def test_a_control_that_misses_one_is_told() -> None:
    assert "control itself misses 1" in _judge(_ratio(1.1, 1.2, 1.3), _ratio(1.01, 1.02, 1.03))[1]
    assert "control itself" not in _judge(_ratio(1.1, 1.2, 1.3), _ratio(0.99, 1.0, 1.01))[1]


def test_a_verdict_on_restless_times_says_so() -> None:
    times = _ratio(1.1, 1.2, 1.3), _ratio(0.99, 1.0, 1.01)
    assert "repeat on a quiet machine" in _judge(*times, steady=False)[1]
    assert "repeat on a quiet machine" not in _judge(*times)[1]


@pytest.mark.timing
def test_a_speed_up_below_the_required_one_fails(make_bundle: MakeBundle) -> None:
    dense = make_bundle("dense", [_identity_with_noise(512, 1.0) for _ in range(3)])
    sparse = make_bundle("sparse", [_identity_with_noise(512, 0.5)])
    found = compare(dense, sparse, **{**QUICK, "batches": (16,)}, require_speedup=50.0)
    with pytest.raises(SpeedupNotReached, match=r"x \[.*\] at batch 16\. At least 50x") as caught:
        check_gates(found)
    assert f"{found.latency[0].ratio.estimate:.3f}x" in str(caught.value)
    assert "FAILED: The speed-up is" in str(found)


@pytest.mark.parametrize(("max_drop", "fails"), [(0.5, True), (1.0, False), (None, False)])
def test_the_accuracy_gate_fails_only_below_the_allowed_drop(
    pair: tuple[Path, Path], max_drop: float | None, fails: bool
) -> None:
    found = compare(*pair, **QUICK, max_drop=max_drop)
    assert (found.gate_failed is not None) == fails
    if fails:
        with pytest.raises(GateFailed, match=r"97\.00 % is 1\.00 points below .* 98\.00 %, more than 0\.5"):
            check_gates(found)
    else:
        check_gates(found)


def test_a_sparse_bundle_that_is_better_passes_a_drop_of_zero(pair: tuple[Path, Path]) -> None:
    dense, sparse = pair
    check_gates(compare(sparse, dense, **QUICK, max_drop=0.0))


def test_an_accuracy_gate_without_any_accuracy_is_refused(make_bundle: MakeBundle) -> None:
    bundles = [make_bundle(name, [_identity_with_noise(8, 1.0)]) for name in ("a", "b")]
    with pytest.raises(UsageError, match="no score is known"):
        compare(*bundles, **QUICK, max_drop=1.0)


def test_bundles_of_another_input_shape_or_other_data_are_refused(make_bundle: MakeBundle) -> None:
    here = make_bundle("here", [_identity_with_noise(8, 1.0)])
    wider = make_bundle("wider", [_identity_with_noise(9, 1.0)])
    elsewhere = make_bundle(
        "elsewhere", [_identity_with_noise(8, 1.0)], data=replace(DATA, test_sha256="cd" * 32)
    )
    with pytest.raises(
        UsageError, match=r"different inputs or outputs: x .*\(batch, 8\) and x .*\(batch, 9\)"
    ):
        compare(here, wider, **QUICK)
    with pytest.raises(UsageError, match=r"different data: .*abab.*cdcd"):
        compare(here, elsewhere, **QUICK)


def test_a_test_set_of_another_shape_is_refused(pair: tuple[Path, Path]) -> None:
    x, y = _samples()
    with pytest.raises(UsageError, match=r"inputs of shape \(300, 15\)\. \(n, 16\) was"):
        compare(*pair, samples=(x[:, :15], y), **QUICK)


@pytest.fixture
def nothing_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("a runtime was opened")

    monkeypatch.setattr(OPENING, "open_runtime", fail)


@pytest.mark.usefixtures("nothing_opens")
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda y: y.astype(np.float32), "are float32, which means regression targets"),
        (lambda y: torch.from_numpy(y).double(), "are float64, which means regression targets"),
        (lambda y: y > 7, "are bool"),
        (lambda y: np.eye(16, dtype=int)[y], "are one-hot"),
        (lambda y: y[:, None], r"have shape \(300, 1\)"),
        (lambda y: y + 1, r"run from 1 to 16, .*Subtract 1"),
        (lambda y: np.where(y == 3, -1, y), "run from -1 to 15"),
        (lambda y: y[:-1], "299 labels for 300 samples"),
    ],
)
def test_labels_that_are_no_class_numbers_are_refused_before_anything_is_opened(
    change: Callable[[np.ndarray], Any], why: str, pair: tuple[Path, Path]
) -> None:
    x, y = _samples()
    with pytest.raises(UsageError, match=f"The labels of the test set .*{why}"):
        compare(*pair, samples=(x, change(y)), **QUICK)


@pytest.mark.usefixtures("nothing_opens")
def test_a_network_with_one_output_is_not_scored(make_bundle: MakeBundle) -> None:
    bundles = [make_bundle(name, [_identity_with_noise(16, 1.0)[:, :1]], data=None) for name in ("a", "b")]
    x, _ = _samples()
    with pytest.raises(UsageError, match=r"a has one output, so its top-1 accuracy .*Leave the test set out"):
        compare(*bundles, samples=(x, (x[:, 0] > 0).astype(np.int64)), **QUICK)


def test_outputs_that_are_not_those_of_the_manifest_are_not_scored(make_bundle: MakeBundle) -> None:
    bundles = [make_bundle(name, [_identity_with_noise(16, 1.0)[:, :1]], data=None) for name in ("a", "b")]
    opened = [open_bundle(path) for path in bundles]
    two = class_signature((16,), 2, names=("x", "logits"))
    claimed = [replace(b, info=replace(b.info, signature=two)) for b in opened]
    x, _ = _samples()
    with pytest.raises(ArtefactError, match=r"has the outputs logits float32 \(batch, 1\)\. .*\(batch, 2\)"):
        compare(*claimed, samples=(x, (x[:, 0] > 0).astype(np.int64)), **QUICK)


def test_outputs_that_are_no_numbers_are_not_scored(make_bundle: MakeBundle) -> None:
    weight = _identity_with_noise(16, 1.0)
    bundles = [make_bundle("a", [weight]), make_bundle("b", [np.where(weight > 0.9, np.nan, weight)])]
    with pytest.raises(
        GateFailed, match=r"The sparse bundle gives NaN or infinity in logits for 300 of 300 samples"
    ):
        compare(*bundles, samples=_samples(), **QUICK)


def test_samples_may_be_tensors(pair: tuple[Path, Path]) -> None:
    x, y = _samples(40)
    found = checked_samples((torch.from_numpy(x), torch.from_numpy(y).to(torch.uint8)), open_bundle(pair[0]))
    (batch,) = found.samples.batches(40)
    np.testing.assert_array_equal(batch["x"], x)
    assert found.targets.dtype == np.int64
    assert found.targets.tolist() == y.tolist()


def test_a_changed_file_is_noticed_before_anything_runs(pair: tuple[Path, Path]) -> None:
    dense, sparse = pair
    content = bytearray((sparse / "model.onnx").read_bytes())
    content[-1] ^= 1
    (sparse / "model.onnx").write_bytes(content)
    with pytest.raises(ArtefactError, match="SHA-256 differs"):
        compare(dense, sparse, **QUICK)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batches": ()}, r"batch sizes are \(\)"),
        ({"batches": (0,)}, r"batch sizes are \(0,\)"),
        ({"batches": (4, 4)}, r"batch sizes are \(4, 4\)"),
        ({"rounds": 5}, "5 rounds"),
        ({"max_drop": -0.1}, "allowed drop is -0.1"),
        ({"max_drop": float("inf")}, "allowed drop is inf"),
        ({"max_drop": float("nan")}, "allowed drop is nan"),
        ({"require_speedup": 0.5}, "speed-up is 0.5"),
        ({"require_speedup": float("inf")}, "speed-up is inf"),
        ({"require_speedup": float("nan")}, "speed-up is nan"),
    ],
)
def test_an_option_without_meaning_is_named(
    pair: tuple[Path, Path], options: dict[str, Any], named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        compare(*pair, **{**QUICK, **options})


def test_the_table_fits_a_terminal_and_names_its_conditions(pair: tuple[Path, Path]) -> None:
    found = compare(*pair, **{**QUICK, "batches": (1, 4)}, samples=_samples())
    lines = str(found).splitlines()
    shown = [line for line in lines if not line.startswith(("dense ", "sparse "))]
    assert max(map(len, shown)) <= 100
    text = "\n".join(lines)
    for expected in (
        "batch 1, median ms",
        "batch 4, median ms",
        "dense twice",
        "threads: 1",
    ):
        assert expected in text
    assert re.search(r"\b(8|12|18|20) interleaved rounds", text)  # as soon as it is decided


def test_results_hold_raw_samples_machine_and_versions(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = compare(*pair, **QUICK)
    path = write_results(tmp_path / "results", found)
    document = json.loads(path.read_text())
    assert path.name == "comparison.json"
    assert document["kind"] == "comparison"
    latency = document["latency"][0]
    n_rounds = latency["ratio"]["n_rounds"]
    assert n_rounds in (8, 12, 18, 20)  # as soon as it is decided, with 20 at most
    for name in ("dense", "dense_again", "sparse"):
        assert len(latency[name]["samples_ms"]) == len(latency[name]["block_median_ms"]) == n_rounds
    assert document["machine"]["n_cores_usable"] >= 1
    assert "numpy" in document["versions"]


class _Played:
    """An engine's session, by onnxruntime; it takes seven samples at most."""

    name, max_batch = "tensorrt-rtx", 7

    def __init__(self, bundle: Bundle) -> None:
        self._session = open_session(bundle.onnx_path, n_threads=1)
        self.signature = self._session.signature

    def run(self, feeds: Feeds) -> dict[str, Array]:
        assert self.signature.n_samples(feeds) <= self.max_batch
        return self._session.run(feeds)

    def close(self) -> None:
        self._session.close()


def _with_engine(folder: Path, state: str) -> Bundle:
    """The bundle as if it had an engine, and a table of what became of its layer."""
    row = {"node": "n", "weight": "w0", "state": state, "text": ""}
    (folder / "layers.json").write_text(json.dumps({"layers": [], "engines": {"engines/x.engine": [row]}}))
    fact = EngineInfo(
        file="engines/x.engine",
        target="tensorrt-rtx",
        precision="fp32",
        version="1.7.1",
        gpu=None,
        architecture=None,
        architectures=(),
        hardware="none",
        version_compatible=False,
        profiles=({"batch": (1, 4, 7)},),
        sparse=True,
        parse_s=0.0,
        build_s=0.0,
        onnx_sha256="00" * 32,
    )
    info = read_bundle_info(folder)
    info = replace(info, files=info.files | file_infos(folder, ["layers.json"]))
    save_bundle_info(folder, info)
    trust.remember(sha256_file(folder / BUNDLE_FILE))
    return Bundle(path=folder, info=replace(info, engines=(fact,)))


def test_engines_are_compared_where_both_bundles_have_one_that_runs(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, sparse = (_with_engine(folder, "picked") for folder in pair)
    monkeypatch.setattr(OPENING, "open_runtime", lambda bundle, name, **_: _Played(bundle))
    monkeypatch.setattr(OPENING, "require_all_genuine", lambda *_, **__: None)
    found = compare(dense, sparse, **QUICK, samples=_samples())
    assert (found.runtime, found.passed_over) == ("tensorrt-rtx", {})
    assert "of its layers 1 picked" in found.latency[0].verdict
    assert found.score_source == "measured"


def test_a_better_runtime_that_cannot_run_is_named_and_one_that_was_asked_for_is_not_replaced(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if tensorrt_import.gpu() is not None:
        pytest.skip("this machine has a card")
    dense, sparse = (_with_engine(folder, "unknown") for folder in pair)
    with pytest.raises(ArtefactError, match=r"lists no engines/x\.engine"):  # changed, or not what was built
        compare(dense, sparse, **QUICK)

    def nobodys(*_: object, **__: object) -> None:
        raise NotTrustedError("Nobody vouches for it.")

    monkeypatch.setattr(OPENING, "require_all_genuine", nobodys)
    assert compare(dense, sparse, **QUICK).passed_over == {"tensorrt-rtx": "Nobody vouches for it."}
    monkeypatch.setattr(OPENING, "require_all_genuine", lambda *_, **__: None)
    found = compare(dense, sparse, **QUICK)
    assert found.runtime == "onnxruntime-cpu"
    assert set(found.passed_over) == {"tensorrt-rtx"}
    assert "Passed over: tensorrt-rtx: " in " ".join(str(found).split())
    with pytest.raises((MissingCapability, ArtefactError)):
        compare(dense, sparse, **QUICK, runtime="tensorrt-rtx")
    with pytest.raises(UsageError, match="no engine for tensorrt-rtx"):
        compare(*pair, **QUICK, runtime="tensorrt-rtx")
    with pytest.raises(MissingCapability, match="cuda"):
        compare(*pair, **QUICK, runtime="onnxruntime-cuda")
    with pytest.raises(UnknownNameError):
        compare(*pair, **QUICK, runtime="onnxruntime")


def test_a_manifest_that_is_vouched_for_counts_for_both_of_two_copies(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(pair[0], tmp_path / "copy")
    first, second = (_with_engine(folder, "picked") for folder in (pair[0], tmp_path / "copy"))
    digest = sha256_file(first.path / BUNDLE_FILE)
    vouched: list[bool] = []

    def note(engines: list[tuple[Bundle, EngineInfo]], *, trusted: TrustedDigests) -> None:
        vouched.extend(digest in trust.digests(trusted) for _ in engines)

    monkeypatch.setattr(OPENING, "open_runtime", lambda bundle, name, **_: _Played(bundle))
    monkeypatch.setattr(OPENING, "require_all_genuine", note)
    compare(first, second, **QUICK, trust=("ab" * 32, digest.upper()))
    assert vouched == [True, True]


def test_progress_names_each_step(pair: tuple[Path, Path]) -> None:
    lines: list[str] = []
    compare(*pair, **{**QUICK, "batches": (1, 2)}, samples=_samples(), on_progress=lines.append)
    assert lines == [
        "accuracy on 300 samples",
        "latency at batch 1, at most 20 rounds and 120 s",
        "latency at batch 2, at most 20 rounds and 120 s",
    ]


def test_each_round_is_told_until_nothing_is_left(pair: tuple[Path, Path]) -> None:
    told: list[tuple[int, int, float]] = []
    found = compare(*pair, **QUICK, samples=_samples(), on_round=lambda *told_of: told.append(told_of))
    (at,) = found.latency
    assert [n for n, _, _ in told] == list(range(1, at.ratio.n_rounds + 1))
    assert {most for _, most, _ in told} == {20}
    assert all(left >= 0 for _, _, left in told)
    assert told[-1][2] == 0


def test_a_budget_that_is_used_up_ends_undecided_and_says_so(pair: tuple[Path, Path]) -> None:
    found = compare(*pair, **QUICK, samples=_samples(), budget_s=1e-3)
    (at,) = found.latency
    assert (at.ratio.n_rounds, at.ended) == (4, "budget")
    assert len(at.sparse.samples_ms) == 4
    if at.outcome == "not told apart":
        assert "more time by --budget" in at.verdict
    assert "4, for which there was time" in str(found)


@pytest.mark.parametrize(
    ("given", "told"), [({"budget_s": 0.0}, "budget is 0"), ({"rounds": 7}, "7 rounds are too few")]
)
def test_a_measurement_without_time_or_rounds_is_refused(
    pair: tuple[Path, Path], given: dict[str, Any], told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        compare(*pair, **{**QUICK, **given}, samples=_samples())


def test_packed_weights_are_expanded_once_for_all_rounds(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expanded: list[Path] = []
    read: Callable[[Path], onnx.ModelProto] = OPENING.dense_from_file
    monkeypatch.setattr(OPENING, "may_be_packed", lambda path: True)

    def counted(path: Path) -> onnx.ModelProto:
        expanded.append(path)
        return read(path)

    monkeypatch.setattr(OPENING, "dense_from_file", counted)
    found = compare(*pair, **QUICK, samples=_samples())
    assert len(expanded) == 2
    assert found.latency[0].ratio.n_rounds >= 8
