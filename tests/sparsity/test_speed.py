"""The mask update is several times faster than full sorts, measured side by side."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.bench_mask_update import NETWORKS, main, measure


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("network", "n_layers", "n_weights"),
    [("vgg-d", 16, 15_239_872), ("lenet300-100", 3, 266_200), ("resnet50-like", 54, 25_502_912)],
)
def test_the_benchmarks_networks_have_the_published_sizes(
    network: str, n_layers: int, n_weights: int
) -> None:
    shapes = NETWORKS[network]()
    assert len(shapes) == n_layers
    assert sum(math.prod(shape) for shape in shapes.values()) == n_weights


@pytest.mark.usefixtures("one_thread")
def test_the_benchmark_writes_every_sample_and_the_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "result.json"
    main(["--network", "lenet300-100", "--rounds", "2", "--json", str(file)])
    document = json.loads(file.read_text())
    assert len(document["update_s"]) == len(document["two_sorts_s"]) == len(document["ratios"]) == 2
    assert document["n_threads"] == 1
    assert document["machine"]["n_cores"] >= 1
    assert "266,200 weights" in capsys.readouterr().out


@pytest.mark.usefixtures("one_thread")
def test_the_benchmark_times_an_update_under_a_pattern_against_one_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "capped.json"
    main(["--network", "lenet300-100", "--rounds", "2", "--pattern", "2:4", "--json", str(file)])
    document = json.loads(file.read_text())
    assert len(document["capped_s"]) == len(document["uncapped_s"]) == len(document["ratios"]) == 2
    assert document["n_weights"] == 265_200  # without the output layer
    assert "under 2:4" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timing
@pytest.mark.usefixtures("one_thread")
def test_an_update_of_vgg_d_is_at_least_five_times_faster_than_two_sorts() -> None:
    # Processor time of one thread: what other processes do on this machine is not in it.
    ratios = measure("vgg-d", n_rounds=5, clock=time.process_time).ratios
    assert statistics.median(ratios) >= 5, ratios
