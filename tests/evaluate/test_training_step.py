from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_export.errors import MissingCapability, RecipeError, SpeedupNotReached, UsageError
from sparse_export.evaluate import training_loop
from sparse_export.evaluate.bench_train import bench_training_step
from sparse_export.evaluate.training_step import PARTS, StepBench, check_speedup, write_step_bench
from sparse_export.formats.run import ProductInfo
from sparse_export.instruments.statistics import Ratio
from sparse_export.train import step24
from sparse_export.train.recipe import Recipe, load_recipe

QUICK: dict[str, Any] = {
    "rounds": 20,
    "block_s": 0.001,
    "warmup_limit_s": 0.05,
    "n_threads": 1,
    "device": "cpu",
    "batch_size": 8,
}


@pytest.fixture(scope="module")
def found() -> StepBench:
    recipe = load_recipe("digits", changes={"sparsity": {"density": 0.2}})
    return bench_training_step(recipe, **(QUICK | {"block_s": 0.01}))


@pytest.mark.timing
def test_the_parts_of_a_step_add_up_to_nearly_all_of_it(found: StepBench) -> None:
    for times in (found.dense, found.dense_again, found.sparse):
        assert tuple(times.part_ms) == PARTS
        assert min(times.part_ms[name] for name in ("forward", "backward", "optimizer")) > 0
        assert sum(times.part_ms.values()) == pytest.approx(times.latency.mean_ms, rel=0.25)


@pytest.mark.timing
def test_only_the_sparse_step_has_mask_work_and_only_it_updates_masks(found: StepBench) -> None:
    assert found.sparse.part_ms["masks"] > found.dense.part_ms["masks"]
    assert (len(found.update_ms), found.update_every) == (20, 500)
    assert found.density == pytest.approx(0.2, abs=0.01)


@pytest.mark.timing
def test_a_step_is_charged_its_share_of_a_mask_update(found: StepBench) -> None:
    seldom = bench_training_step("digits", **QUICK, update_every=10**9, seed=3)
    often = bench_training_step("digits", **QUICK, update_every=1, seed=3)
    assert (seldom.update_every, often.update_every) == (10**9, 1)
    assert often.ratio.estimate < 0.9 * seldom.ratio.estimate


def test_rates_are_those_of_the_mean_step(found: StepBench) -> None:
    mean_ms = found.sparse.latency.mean_ms
    assert found.sparse.steps_per_s == pytest.approx(1e3 / mean_ms)
    assert found.sparse.samples_per_s == pytest.approx(8e3 / mean_ms)


@pytest.mark.timing
def test_no_gain_is_told_with_its_reason(found: StepBench) -> None:
    if found.outcome == "speed-up":
        pytest.fail(f"masks made a step faster: {found.ratio}")
    text = " ".join(str(found).split())
    assert "masks add theirs" in text
    assert "forward" in text
    assert "should hold 1" in text


def test_the_written_document_keeps_every_round(found: StepBench, tmp_path: Path) -> None:
    document = json.loads(write_step_bench(tmp_path, found).read_text())
    assert document["kind"] == "bench-train"
    assert document["sparse"]["latency"]["samples_ms"] == list(found.sparse.latency.samples_ms)
    assert document["update_ms"] == list(found.update_ms)


@pytest.mark.parametrize(
    ("outcome", "low", "fails"),
    [
        ("speed-up", 1.3, False),
        ("speed-up", 1.1, True),
        ("no difference", 1.3, True),
    ],
)
def test_a_required_speed_up_needs_the_low_end_and_the_outcome(
    outcome: str, low: float, fails: bool, found: StepBench
) -> None:
    ratio = Ratio(estimate=1.4, low=low, high=1.5, n_rounds=20, n_outliers=0, autocorrelation=0.0)
    result = replace(found, outcome=outcome, ratio=ratio, required_speedup=1.2)
    if fails:
        with pytest.raises(SpeedupNotReached, match=r"1\.400"):
            check_speedup(result)
    else:
        check_speedup(result)


def test_a_pattern_and_its_methods_can_be_timed() -> None:
    for method, has_updates in (("sparse-momentum", True), ("sr-ste", False)):
        recipe = load_recipe(
            "digits", changes={"sparsity": {"pattern": "2:4", "density": None, "method": method}}
        )
        result = bench_training_step(recipe, **QUICK)
        assert (result.update_every is not None, bool(result.update_ms)) == (has_updates, has_updates)
        assert result.density <= 0.5


def _by_csr(dense_ms: float | None) -> Callable[..., tuple[ProductInfo, ...]]:
    """Choices that hang on no clock: CSR for the linear layers, or for none."""

    def choose(model: nn.Module, masks: dict[str, Tensor], sample: Tensor) -> tuple[ProductInfo, ...]:
        return tuple(
            ProductInfo(
                name=name,
                by="csr" if dense_ms is not None and name.startswith("fc1") else "dense",
                density=0.05,
                n_rows=len(sample),
                dense_ms=dense_ms,
                csr_ms=1.0,
                reason="as the test says",
            )
            for name in masks
        )

    return choose


@pytest.fixture
def csr_recipe() -> Recipe:
    sparsity = {"density": 0.05, "products": "csr", "window": 10, "update_every": 40}
    return load_recipe("mnist-lenet300-100", changes={"sparsity": sparsity})


def test_csr_products_are_timed_in_both_kinds_of_steps_and_count_by_their_shares(
    csr_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_loop, "choose_products", _by_csr(2.0))
    found = bench_training_step(csr_recipe, **QUICK)
    phases = found.phases
    assert phases is not None
    assert (phases.window_steps, found.update_every, len(found.update_ms)) == (10, 40, 20)
    kinds = found.sparse.latency.mean_ms, phases.window.latency.mean_ms
    update_ms = sum(found.update_ms) / len(found.update_ms) / 40
    assert phases.mean_ms == pytest.approx(0.75 * kinds[0] + 0.25 * kinds[1] + update_ms)
    assert found.ratio.estimate < max(phases.between.estimate, phases.within.estimate)
    text = " ".join(str(found).split())
    assert "Of 3 masked weights 1 are multiplied without" in text
    assert "10 of 40" in text
    assert "fc1.weight by csr: as the test says" in text
    assert "all in all" in text
    json.dumps(asdict(found))


def test_where_csr_products_win_nowhere_the_step_is_the_masked_one_and_says_so(
    csr_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_loop, "choose_products", _by_csr(None))
    found = bench_training_step(csr_recipe, **QUICK)
    assert found.phases is None
    assert len(found.products) == 3
    assert "won for no layer: fc1.weight, as the test says" in " ".join(str(found).split())


def test_masks_that_never_move_have_no_update_and_no_window(
    csr_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_loop, "choose_products", _by_csr(2.0))
    static = replace(csr_recipe.sparsity, method="static")
    found = bench_training_step(csr_recipe.model_copy(update={"sparsity": static}), **QUICK)
    assert found.phases is not None
    assert (found.update_ms, found.update_every, found.phases.window_steps) == ((), None, 0)


def _digits(**changes: Any) -> Recipe:
    return load_recipe("digits", changes=changes)


@pytest.mark.parametrize(
    ("changes", "options", "named"),
    [
        ({"dense": True}, {}, "dense one"),
        ({}, {"batch_size": 0}, "batch size is 0"),
        ({}, {"update_every": 0}, "update interval is 0"),
        ({}, {"n_threads": 0}, "number of threads is 0"),
        ({}, {"rounds": 3}, "3 rounds"),
        ({}, {"require_speedup": 0.5}, "speed-up is 0.5"),
        ({}, {"input_shape": (0, 8)}, "shape is"),
        ({}, {"device": "tpu"}, "'tpu'"),
        ({"model": "tests.models.nowhere:make"}, {}, "not known"),
    ],
)
def test_options_without_meaning_are_refused(
    changes: dict[str, Any], options: dict[str, Any], named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        bench_training_step(_digits(**changes), **(QUICK | options))


def test_a_recipe_that_is_none_is_told_as_one() -> None:
    with pytest.raises((RecipeError, UsageError), match="no recipe named"):
        bench_training_step("digitss", **QUICK)


def test_without_a_card_cuda_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a card")
    with pytest.raises(MissingCapability, match="no CUDA device"):
        bench_training_step("digits", **(QUICK | {"device": "cuda"}))


@pytest.mark.gpu
def test_on_a_card_the_parts_are_device_times() -> None:
    result = bench_training_step("cifar10-wrn-28-2", **(QUICK | {"device": "cuda", "batch_size": 64}))
    assert sum(result.sparse.part_ms.values()) == pytest.approx(result.sparse.latency.mean_ms, rel=0.2)


def test_forward_products_by_the_card_are_timed_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step24, "BACKEND_24", "reference")
    sparsity = {"pattern": "2:4", "density": None, "products": "2:4", "approach": [0.0, 0.5]}
    recipe = load_recipe("digits", changes={"precision": "bf16", "sparsity": sparsity})
    found = bench_training_step(
        recipe, device="cpu", rounds=20, block_s=0.0005, warmup_limit_s=0.01, n_threads=1
    )
    by = {fact.name: fact.by for fact in found.products}
    assert "2:4" in by.values()
    assert (
        f"Forward products of {list(by.values()).count('2:4')} of {len(by)} masked weights are 2:4"
        in found.verdict
    )
    assert "dense ones" not in found.verdict


def test_steps_that_training_launches_as_one_graph_are_said_to_be_timed_one_by_one() -> None:
    recipe = load_recipe("digits", changes={"cuda_graph": True})
    assert "launched kernel by kernel" in bench_training_step(recipe, **QUICK).verdict


def test_compressing_moved_masks_belongs_to_the_update_and_not_to_the_step_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow_s = 0.03
    compress = step24.Step24._compress
    calls: list[str] = []

    def slowly(self: step24.Step24, name: str, *rest: Any) -> None:
        if calls:  # the first ones, before anything is timed, need no sleep
            time.sleep(slow_s)
        calls.append(name)
        compress(self, name, *rest)

    monkeypatch.setattr(step24, "BACKEND_24", "reference")
    monkeypatch.setattr(step24.Step24, "_compress", slowly)
    sparsity = {"pattern": "2:4", "density": None, "products": "2:4"}
    recipe = load_recipe("digits", changes={"precision": "bf16", "sparsity": sparsity})
    found = bench_training_step(
        recipe, device="cpu", rounds=20, block_s=0.0005, warmup_limit_s=0.01, n_threads=1, batch_size=2
    )
    n_layers = len(set(calls))
    assert min(found.update_ms) >= 1e3 * slow_s * n_layers
    assert found.sparse.latency.median_ms < 1e3 * slow_s * n_layers


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a card")
def test_without_a_card_24_products_are_not_timed() -> None:
    sparsity = {"pattern": "2:4", "density": None, "products": "2:4"}
    recipe = load_recipe("digits", changes={"precision": "bf16", "sparsity": sparsity})
    with pytest.raises(MissingCapability, match="on cpu"):
        bench_training_step(recipe, device="cpu", rounds=20, block_s=0.0005, warmup_limit_s=0.01)


def test_a_network_whose_layers_get_their_shapes_from_the_input_can_be_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lazy_for_bench.py").write_text(
        "from torch import nn\n"
        "def make():\n    return nn.Sequential(nn.Flatten(), nn.LazyLinear(16), nn.ReLU(), "
        "nn.LazyLinear(10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    recipe = _digits(model="lazy_for_bench:make", sparsity={"density": 0.2})
    assert bench_training_step(recipe, **QUICK, input_shape=(1, 8, 8)).density == pytest.approx(0.2, abs=0.01)
