from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sparse_export import models
from sparse_export.errors import ArtefactError, MissingCapability, SpeedupNotReached, UsageError
from sparse_export.formats.layer_plan import read_layer_plan, write_layer_plan
from sparse_export.formats.timings import ProductTiming, Timings, read_timings, write_timings
from sparse_export.plan.layers import Product, products_of
from sparse_export.plan.network import plan_network
from sparse_export.plan.planning import make_plan
from sparse_export.plan.table import plan_shown
from sparse_export.plan.timing import measure_timings
from sparse_export.sparsity.product24 import Backend
from tests.making_runs import digits_run

HALF: dict[str, Any] = {"dtype": torch.float16, "backend": "cusparselt"}


def _rounds(middle_ms: float, seed: int) -> tuple[float, ...]:
    noise = np.random.default_rng(seed).standard_normal(24)
    return tuple((middle_ms * np.exp(0.01 * noise)).tolist())


def _timings(products: Sequence[Product], ratio: Callable[[Product], float], **changes: Any) -> Timings:
    """Every product takes 1 us for 1,000 multiplications, divided by its ratio where it is 2:4."""
    timed = {}
    for seed, one in enumerate(products):
        if one.reason is None and one.n_rows is not None:
            dense_ms = one.n_outputs * one.n_inputs * one.n_rows / 1e6
            timed[one.n_outputs, one.n_inputs, one.n_rows] = ProductTiming(
                n_outputs=one.n_outputs,
                n_inputs=one.n_inputs,
                n_rows=one.n_rows,
                dense_ms=_rounds(dense_ms, seed),
                sparse_ms=_rounds(dense_ms / ratio(one), 1000 + seed),
            )
    total_ms = sum(one.n_outputs * one.n_inputs * (one.n_rows or 0) / 1e6 for one in products)
    fields: dict[str, Any] = {
        "model": "vit-b-16",
        "device": "made up",
        "dtype": "float16",
        "backend": "cusparselt",
        "batch": 8,
        "model_ms": _rounds(1.25 * total_ms, 99),
        "products": tuple(timed.values()),
        "machine": {},
        "cards": {},
        "versions": {},
        "created": "2026-11-25T00:00:00+00:00",
    }
    return Timings(**(fields | changes))


@pytest.fixture(scope="module")
def vit() -> tuple[Product, ...]:
    torch.manual_seed(0)
    model = models.create("vit-b-16")
    return products_of(model, (3, 224, 224), 8, **HALF)


def test_sizes_rows_and_losses_of_a_vision_transformer(vit: tuple[Product, ...]) -> None:
    by_name = {one.name: one for one in vit}
    block = "encoder.layers.encoder_layer_0"
    for name, size in (
        ("self_attention.in_proj_weight", (2304, 768)),
        ("self_attention.out_proj.weight", (768, 768)),
        ("mlp.0.weight", (3072, 768)),
        ("mlp.3.weight", (768, 3072)),
    ):
        one = by_name[f"{block}.{name}"]
        assert (one.n_outputs, one.n_inputs, one.n_rows, one.reason) == (*size, 8 * 197, None)
    assert "16x16 convolution" in str(by_name["conv_proj.weight"].reason) or "3 channels" in str(
        by_name["conv_proj.weight"].reason
    )
    assert by_name["heads.head.weight"].reason == "it has 1000 outputs, and cusparselt wants a multiple of 16"
    share = sum(one.lost or 0.0 for one in vit)
    assert (
        0.2 < share < 0.4
    )  # of normal or uniform weights, about a quarter lies outside the two largest of four


def test_rows_of_a_1x1_convolution_are_its_pixels() -> None:
    model = nn.Sequential(
        nn.Conv2d(16, 32, 1, stride=2), nn.BatchNorm2d(32), nn.Flatten(), nn.Linear(32 * 16, 16)
    )
    first, last = products_of(model, (16, 8, 8), 4, **HALF)
    assert (first.n_rows, first.reason) == (4 * 16, None)
    assert last.reason == "it gives the outputs"


def test_the_shape_that_a_network_cannot_take_is_refused() -> None:
    with pytest.raises(UsageError, match=r"\(3, 9\)"):
        products_of(nn.Sequential(nn.Linear(16, 16)), (3, 9), 4, **HALF)


def test_layers_that_are_not_faster_stay_dense_by_rule(vit: tuple[Product, ...]) -> None:
    timings = _timings(
        vit, lambda one: 1.4 if one.n_outputs == 3072 else 0.9 if one.n_inputs == 3072 else 1.0
    )
    plan = make_plan(vit, timings, model="vit-b-16", batch=8, weights="random weights")
    assert len(plan.sparse) == 12
    assert all(name.endswith("mlp.0.weight") for name in plan.sparse)
    why = {layer.name: layer.why for layer in plan.layers}
    assert "not faster here: dense / 2:4 is 0.9" in why["encoder.layers.encoder_layer_3.mlp.3.weight"]
    assert set(plan.sparse) | set(plan.dense) == {one.name for one in vit}


def test_without_a_requirement_the_expected_speed_up_follows_from_what_is_saved(
    vit: tuple[Product, ...],
) -> None:
    plan = make_plan(vit, _timings(vit, lambda _: 1.5), model="vit-b-16", batch=8, weights="random weights")
    assert len(plan.sparse) == 48
    saved = sum(layer.saved_ms for layer in plan.layers if layer.sparse)
    assert plan.expected_speedup == pytest.approx(plan.model_ms / (plan.model_ms - saved))
    assert 1.25 < plan.expected_speedup < 1.40
    text = " ".join(plan_shown(plan).draw().split())
    assert "48 of 50 layers become 2:4" in text
    assert "not measured on the whole network" in text


def test_a_speed_up_is_reached_with_the_least_loss(vit: tuple[Product, ...]) -> None:
    timings = _timings(vit, lambda _: 1.5)
    everything = make_plan(vit, timings, model="vit-b-16", batch=8, weights="random weights")
    plan = make_plan(vit, timings, model="vit-b-16", batch=8, weights="random weights", speedup=1.1)
    assert 1.1 <= plan.expected_speedup < 1.12
    assert plan.lost < 0.5 * everything.lost
    left = [layer for layer in plan.layers if not layer.sparse and layer.ratio and layer.ratio.low > 1]
    assert left
    assert all("not worth its weights" in layer.why for layer in left)


def test_a_largest_loss_is_kept_and_used(vit: tuple[Product, ...]) -> None:
    timings = _timings(vit, lambda _: 1.5)
    plan = make_plan(vit, timings, model="vit-b-16", batch=8, weights="random weights", max_sparse_loss=0.1)
    assert 0.09 < plan.lost <= 0.1


def test_a_speed_up_out_of_reach_tells_what_is(vit: tuple[Product, ...]) -> None:
    with pytest.raises(SpeedupNotReached, match=r"48 layers .* 1\.[23]"):
        make_plan(
            vit,
            _timings(vit, lambda _: 1.5),
            model="vit-b-16",
            batch=8,
            weights="random weights",
            speedup=1.9,
        )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"speedup": 1.1, "max_sparse_loss": 0.1}, "both given"),
        ({"speedup": 1.0}, "speed-up is 1.0"),
        ({"speedup": float("nan")}, "nan"),
        ({"max_sparse_loss": 1.5}, "loss is 1.5"),
        ({"batch": 9}, "of the batch 8"),
        ({"model": "vit-l-16"}, "of the network vit-b-16"),
    ],
)
def test_requirements_without_meaning_and_other_timings_are_refused(
    options: dict[str, Any], named: str, vit: tuple[Product, ...]
) -> None:
    given: dict[str, Any] = {"model": "vit-b-16", "batch": 8, "weights": "random weights"}
    with pytest.raises(UsageError, match=named):
        make_plan(vit, _timings(vit, lambda _: 1.5), **(given | options))


def test_a_size_that_was_not_timed_stays_dense(vit: tuple[Product, ...]) -> None:
    timings = replace(_timings(vit, lambda _: 1.5), products=())
    plan = make_plan(vit, timings, model="vit-b-16", batch=8, weights="random weights")
    assert plan.sparse == ()
    assert sum(layer.why == "its size was not timed" for layer in plan.layers) == 48


def test_a_plan_is_read_back_as_it_was_written(vit: tuple[Product, ...], tmp_path: Path) -> None:
    plan = make_plan(vit, _timings(vit, lambda _: 1.5), model="vit-b-16", batch=8, weights="random weights")
    write_layer_plan(tmp_path / "plan.json", plan)
    assert read_layer_plan(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, UsageError),
        ("{", ArtefactError),
        ('{"kind": "run", "schema_version": 1}', ArtefactError),
        ('{"kind": "plan", "schema_version": 99}', ArtefactError),
        ('{"kind": "plan", "schema_version": 1}', ArtefactError),
    ],
)
def test_what_is_no_plan_is_told(content: str | None, error: type[Exception], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(error):
        read_layer_plan(file)


def test_timings_that_are_not_paired_are_refused(vit: tuple[Product, ...], tmp_path: Path) -> None:
    timings = _timings(vit, lambda _: 1.5)
    broken = replace(timings.products[0], sparse_ms=timings.products[0].sparse_ms[:-1])
    file = tmp_path / "timings.json"
    write_timings(file, replace(timings, products=(broken,)))
    with pytest.raises(ArtefactError, match="24 dense and 23 sparse"):
        read_timings(file)
    write_timings(file, timings)
    assert read_timings(file) == timings


def test_measuring_times_every_size_once_and_the_whole_network() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4))
    backend: Backend = "reference"
    products = products_of(model, (16,), 4, torch.float32, backend)
    sizes = [(one.n_outputs, one.n_inputs, one.n_rows or 0) for one in products if one.reason is None]
    found = measure_timings(
        model,
        (16,),
        sizes,
        name=None,
        batch=4,
        dtype=torch.float32,
        backend=backend,
        device=torch.device("cpu"),
        rounds=20,
        block_s=0.001,
        warmup_limit_s=0.05,
    )
    assert [one.size for one in found.products] == [(32, 16, 4), (32, 32, 4)]
    assert len(found.model_ms) == len(found.products[0].dense_ms) == len(found.products[0].sparse_ms) == 20
    plan = make_plan(products, found, model=None, batch=4, weights="random weights")
    assert [layer.ratio is not None for layer in plan.layers] == [True, True, True, False]


def test_without_a_card_or_timings_nothing_is_planned() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a card")
    with pytest.raises(MissingCapability, match="no 2:4 product to measure"):
        plan_network("vit-b-16")


def test_a_run_is_planned_by_its_own_weights(tmp_path: Path) -> None:
    run = digits_run(tmp_path / "run", density=1.0)
    products = products_of(models.create("digits-cnn"), (1, 8, 8), 8, **HALF)
    file = tmp_path / "timings.json"
    write_timings(file, _timings(products, lambda _: 1.5, model="digits-cnn"))
    plan, _ = plan_network(run.path, batch=8, timings=file)
    assert (plan.weights, plan.model) == (str(run.path), "digits-cnn")
    with pytest.raises(UsageError, match="not a file"):
        plan_network(run.path, timings=tmp_path / "nothing.json")
    document = json.loads(file.read_text())
    for field, value in (("dtype", "load"), ("backend", "magic")):
        file.write_text(json.dumps(document | {field: value}))
        with pytest.raises(UsageError, match=f"'{value}'"):
            plan_network(run.path, batch=8, timings=file)
