"""Whole networks, dense and as planned: by the dense reference of 2:4 products, whose times mean nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparse_export import models
from sparse_export.errors import GateFailed, MissingCapability, SpeedupNotReached, UsageError
from sparse_export.instruments.card import CardLog
from sparse_export.instruments.statistics import Ratio
from sparse_export.plan.network import require_gpu
from sparse_export.plan.whole import (
    WholeNetwork,
    check_never_slower,
    measure_whole,
    prepare,
    write_whole,
)
from sparse_export.runtimes.torch24 import Rewritten, rewrite
from sparse_export.sparsity.compressed import TWO_FOUR
from sparse_export.sparsity.pattern import groups_over
from tests.cli.conftest import Call

QUICK: dict[str, Any] = {
    "batch": 4,
    "dtype": torch.float32,
    "backend": "reference",
    "device": torch.device("cpu"),
    "rounds": 20,
    "block_s": 0.0005,
    "warmup_limit_s": 0.01,
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))


@pytest.fixture(scope="module")
def found() -> WholeNetwork:
    return measure_whole(
        net(), (16,), ["0.weight", "2.weight"], ("2.weight",), name="made up", expected=1.1, **QUICK
    )


def test_three_ways_of_one_network_agree_and_are_timed_in_turn(found: WholeNetwork) -> None:
    assert (found.n_possible, found.n_planned) == (2, 1)
    assert set(found.samples_ms) == {"dense", "dense again", "everywhere", "planned"}
    assert {len(samples) for samples in found.samples_ms.values()} == {20}
    assert max(found.relative_difference.values()) < 1e-5
    assert set(found.how.values()) == {"eager"}
    assert found.floor >= 1
    assert not found.compiled


def test_it_is_told_in_words_and_written_with_every_round(found: WholeNetwork, tmp_path: Path) -> None:
    fast = Ratio(estimate=1.2, low=1.15, high=1.25, n_rounds=24, n_outliers=0, autocorrelation=0.0)
    slow = replace(fast, estimate=0.8, low=0.75, high=0.85)
    told = " ".join(str(replace(found, everywhere=slow, planned=fast, floor=1.01, steady=False)).split())
    assert "2:4 wherever it can be (2 layers): slow-down, 2:4 takes 1.250x as long [1.176, 1.333]." in told
    assert "As planned (1 layers): speed-up of 1.200x [1.150, 1.250]." in told
    assert "Single products let expect 1.100." in told
    assert "not become steady" in told
    assert "CUDA graph" not in told
    launched = replace(found, device="a card", how={"dense": "cuda graph", "planned": "eager"})
    assert "for want of a CUDA graph: planned" in " ".join(str(launched).split())
    assert "As planned (1 layers): not told apart; dense / 2:4 is 1.200" in str(
        replace(found, planned=replace(fast, low=1.0), floor=1.01)
    )
    write_whole(tmp_path / "whole.json", found)
    document = json.loads((tmp_path / "whole.json").read_text())
    assert document["kind"] == "whole-network"
    assert document["samples_ms"]["planned"] == list(found.samples_ms["planned"])


def test_a_plan_that_may_be_slower_than_dense_is_refused(found: WholeNetwork) -> None:
    ratio = Ratio(estimate=1.0, low=0.99, high=1.01, n_rounds=24, n_outliers=0, autocorrelation=0.0)
    check_never_slower(replace(found, planned=ratio))
    check_never_slower(replace(found, planned=None))
    with pytest.raises(SpeedupNotReached, match=r"1\.000x \[0\.989, 1\.010\]"):
        check_never_slower(replace(found, planned=replace(ratio, low=0.9889)))


def test_a_plan_without_a_layer_is_the_dense_network() -> None:
    found = measure_whole(net(), (16,), ["0.weight"], (), name=None, **QUICK)
    assert found.planned is None
    assert found.everywhere is not None
    assert "As planned it has no 2:4 layer, and is the dense network." in " ".join(str(found).split())
    assert isinstance(found.cards, CardLog)


def test_a_network_is_made_ready_the_same_once_and_twice() -> None:
    network = net()
    with torch.no_grad():
        network.get_parameter("4.weight").zero_()
    prepare(network, ["0.weight"], (16,))
    first = {name: value.clone() for name, value in network.state_dict().items()}
    assert int(groups_over(network.get_parameter("0.weight"), 1, TWO_FOUR)) == 0
    assert int(groups_over(network.get_parameter("2.weight"), 1, TWO_FOUR)) > 0
    assert network.get_parameter("4.weight").any()
    prepare(network, ["0.weight"], (16,))
    assert all(torch.equal(value, first[name]) for name, value in network.state_dict().items())


def test_what_is_made_ready_has_its_batch_norms_folded_and_computes_the_same() -> None:
    torch.manual_seed(0)
    network = models.create("resnet18").eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.get_buffer("running_mean").uniform_(-1, 1)
            module.get_buffer("running_var").uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = network(x)
        prepare(network, [], (3, 64, 64))
        torch.testing.assert_close(network(x), wanted, rtol=1e-3, atol=1e-4)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize("last", [nn.Threshold(1e9, 0.0), nn.Threshold(1e9, float("inf"))])
def test_outputs_of_zeros_or_infinities_are_no_evidence(last: nn.Module) -> None:
    network = nn.Sequential(nn.Linear(16, 32), last)
    with pytest.raises(UsageError, match="norm of what the network answers"):
        measure_whole(network, (16,), ["0.weight"], (), name=None, **QUICK)


def test_products_that_compute_something_else_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module, **options: Any) -> Rewritten:
        made = rewrite(model, **options)
        with torch.no_grad():
            made.model.get_parameter("4.bias").add_(1.0)
        return made

    monkeypatch.setattr("sparse_export.plan.whole.rewrite", wrong)
    with pytest.raises(GateFailed, match="answers otherwise than the dense one: everywhere by"):
        measure_whole(net(), (16,), ["0.weight"], (), name=None, **QUICK)


def test_without_a_card_nothing_is_verified_and_it_says_so(tmp_path: Path, call: Call) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a card")
    with pytest.raises(MissingCapability, match="no 2:4 product"):
        require_gpu()
    assert call("plan", "vit-b-16", "--verify").exit_code == 5
    assert call("plan", "vit-b-16", "--keep-verified", tmp_path / "x.json").exit_code == 2


@pytest.mark.gpu
def test_on_a_card_a_plan_is_verified(tmp_path: Path, call: Call) -> None:
    file = tmp_path / "whole.json"
    words = ("plan", "vit-b-16", "--batch", 8, "--rounds", 20, "--verify", "--keep-verified", file, "--json")
    result = call(*words)
    assert result.exit_code in (0, 4), result.stderr
    document = json.loads(file.read_text())
    assert set(document["how"].values()) == {"cuda graph"}
    assert max(document["relative_difference"].values()) < 0.02
