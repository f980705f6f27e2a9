"""Layers of two engines against each other, by a profiler that makes its times up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from sparse_export.engines.tactics import Kernels
from sparse_export.errors import UsageError
from sparse_export.formats.layers import EngineLayer, EngineTimes, LayerTiming
from sparse_export.runtimes.layer_times import Pass, TimedLayers, compare_layers, time_layers

NODES = ("stem", "conv", "relu", "fc")
QUICK: dict[str, Any] = {"rounds": 20, "block_s": 1e-4, "warmup_limit_s": 0.05}


def _pass(ms: Mapping[str, float], *, noise: float = 0.01, seed: int = 0) -> Pass:
    generator = np.random.default_rng(seed)

    def once() -> Sequence[tuple[str, float]]:
        common = 1 + noise * generator.standard_normal()
        return [
            (name, value * common * (1 + noise * generator.standard_normal())) for name, value in ms.items()
        ]

    return once


DENSE = {"stem": 0.02, "conv + relu": 0.06, "fc": 0.03, "softmax": 0.01}
SPARSE = DENSE | {"conv + relu": 0.04}


def _timed(dense: Mapping[str, float] = DENSE, sparse: Mapping[str, float] = SPARSE, **noise: float) -> Any:
    passes = {
        "dense": _pass(dense, seed=1, **noise),
        "dense again": _pass(dense, seed=2, **noise),
        "sparse": _pass(sparse, seed=3, **noise),
    }
    return time_layers(passes, batch=8, **QUICK)


def _layer(node: str, state: Any, text: str = "") -> EngineLayer:
    return EngineLayer(node=node, weight=f"{node}.weight", state=state, text=text)


def _kernels(**names: str) -> list[Kernels]:
    return [Kernels(layer=name, nodes=frozenset({name}), names=(kernel,)) for name, kernel in names.items()]


LAYERS = (
    _layer("stem", "not eligible", "3 inputs are not a multiple of 4."),
    _layer("conv", "picked", "The builder's log names it among those with a sparse kernel."),
    _layer("fc", "not picked", "The builder timed sparse kernels for it, and a dense one was faster."),
)


def _rows(
    timed: Mapping[str, TimedLayers],
    layers: Sequence[EngineLayer] = LAYERS,
    dense_kernels: Sequence[Kernels] = (),
    sparse_kernels: Sequence[Kernels] = (),
) -> tuple[EngineTimes, dict[str, LayerTiming]]:
    found = compare_layers(
        timed, layers, dense_kernels=dense_kernels, sparse_kernels=sparse_kernels, nodes=NODES
    )
    return found, {(row.sparse_layers or row.dense_layers)[0]: row for row in found.rows}


def test_times_are_those_of_the_profiler_and_a_layer_told_of_twice_counts_twice() -> None:
    def once() -> list[tuple[str, float]]:
        return [("conv", 1.0), ("fc", 0.5), ("conv", 2.0)]

    found = time_layers({"a": once}, batch=4, **QUICK)["a"]
    assert found.samples_ms == {"conv": (3.0,) * 20, "fc": (0.5,) * 20}
    assert found.whole.median_ms == pytest.approx(3.5)
    assert (found.whole.batch, found.whole.steady) == (4, True)


def test_passes_of_the_warm_up_do_not_count() -> None:
    n_passes = 0

    def once() -> list[tuple[str, float]]:
        nonlocal n_passes
        n_passes += 1
        return [("conv", 9.0 if n_passes < 4 else 1.0)]

    found = time_layers({"a": once}, batch=1, rounds=20, block_s=1e-3, warmup_limit_s=0.05)["a"]
    assert found.samples_ms["conv"] == (1.0,) * 20


def test_the_median_of_a_block_sets_a_disturbed_pass_aside() -> None:
    n_passes = 0

    def once() -> list[tuple[str, float]]:
        nonlocal n_passes
        n_passes += 1
        return [("conv", 50.0 if n_passes % 11 == 0 else 1.0)]

    found = time_layers({"a": once}, batch=1, rounds=20, block_s=0.011, warmup_limit_s=0.05)["a"]
    assert found.whole.n_calls_per_block > 5
    assert found.samples_ms["conv"] == (1.0,) * 20


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(UsageError, match="5 rounds"):
        time_layers({"a": _pass(DENSE)}, batch=1, rounds=5)


def test_a_faster_sparse_kernel_is_a_speed_up_with_its_interval() -> None:
    found, rows = _rows(_timed())
    conv = rows["conv + relu"]
    assert conv.outcome == "speed-up"
    assert conv.ratio is not None
    assert conv.low is not None
    assert conv.high is not None
    # One interval in twenty misses the truth, and the clock decides how much of the noise warm-up takes.
    assert conv.ratio == pytest.approx(1.5, rel=0.02)
    assert 1.4 < conv.low < conv.ratio < conv.high < 1.6
    assert conv.weights == ("conv.weight",)
    assert conv.nodes == ("conv", "relu")
    assert conv.dense_ms == pytest.approx(0.06, rel=0.02)
    assert conv.verdict.startswith("Speed-up: dense / sparse is 1.")
    assert found.whole is not None
    assert found.whole.ratio == pytest.approx(0.12 / 0.10, rel=0.02)
    assert (found.batch, found.rounds) == (8, 20)


def test_every_row_without_a_speed_up_says_why() -> None:
    _, rows = _rows(_timed())
    assert rows["stem"].verdict.startswith("No speed-up, because hardware cannot use its zeros")
    assert rows["stem"].verdict.endswith("3 inputs are not a multiple of 4.")
    assert rows["fc"].verdict.startswith("No speed-up, because no sparse kernel is known for it")
    assert rows["fc"].verdict.endswith("a dense one was faster.")
    assert rows["softmax"].verdict.startswith("No speed-up, because it multiplies by no weight")


def test_a_sparse_kernel_that_gains_nothing_or_loses_is_told_as_such() -> None:
    _, rows = _rows(_timed(sparse=DENSE))
    assert "its sparse kernel saves less than can be resolved here" in rows["conv + relu"].verdict
    _, rows = _rows(_timed(sparse=DENSE | {"conv + relu": 0.09}))
    assert rows["conv + relu"].outcome == "slow-down"
    assert "its sparse kernel is slower here" in rows["conv + relu"].verdict


def test_kernels_are_named_and_the_same_one_in_both_engines_is_the_reason() -> None:
    kernels = _kernels(stem="sm90_conv", fc="sm90_gemm")
    _, rows = _rows(_timed(), dense_kernels=kernels, sparse_kernels=kernels)
    assert rows["fc"].sparse_kernels == rows["fc"].dense_kernels == ("sm90_gemm",)
    assert "both engines run the same kernel" in rows["fc"].verdict


def test_a_speed_up_with_no_sparse_kernel_is_not_credited_to_one() -> None:
    layers = (_layer("conv", "unknown", "Neither the builder's log nor the inspector reports it."),)
    _, rows = _rows(_timed(), layers)
    assert rows["conv + relu"].outcome == "speed-up"
    assert "No sparse kernel is known for it." in rows["conv + relu"].verdict


def test_a_reformat_that_a_sparse_kernel_needs_is_charged_to_its_layer() -> None:
    reformat = "Reformatting CopyNode for Input Tensor 0 to conv + relu"
    _, rows = _rows(_timed(sparse={reformat: 0.03} | SPARSE))
    row = rows[reformat]
    assert row.sparse_layers == (reformat, "conv + relu")
    assert row.sparse_ms == pytest.approx(0.07, rel=0.02)
    assert row.outcome == "slow-down"


def test_a_layer_that_only_one_engine_has_is_not_compared() -> None:
    _, rows = _rows(_timed(sparse=SPARSE | {"copy": 0.01}))
    assert (rows["copy"].outcome, rows["copy"].ratio, rows["copy"].dense_ms) == ("not compared", None, None)
    assert rows["copy"].verdict.startswith("Only the engine with sparse kernels has it")


def test_a_layer_of_no_measured_time_is_not_compared() -> None:
    nothing = DENSE | {"softmax": 0.0}
    _, rows = _rows(_timed(dense=nothing, sparse=nothing))
    assert rows["softmax"].outcome == "not compared"
    assert "too short" in rows["softmax"].verdict


@pytest.mark.parametrize("seed", range(5))
def test_noise_alone_fakes_no_speed_up(seed: int) -> None:
    generator = np.random.default_rng(seed)
    passes = {
        name: _pass(DENSE, noise=0.2, seed=int(generator.integers(1 << 30)))
        for name in ("dense", "dense again", "sparse")
    }
    found, _ = _rows(time_layers(passes, batch=1, **QUICK))
    assert sum(row.outcome in ("speed-up", "slow-down") for row in found.rows) == 0
