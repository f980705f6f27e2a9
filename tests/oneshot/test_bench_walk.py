"""The benchmark of how pruning grows measures what it says."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import bench_walk
from sparse_export.oneshot.graph_pruning import PrunedGraph, sparsify_graph


def test_the_exponent_is_the_power_that_times_grow_by() -> None:
    sizes = (6, 12, 24, 48)
    assert bench_walk.exponent(sizes, [0.3 * size**1.5 for size in sizes]) == pytest.approx(1.5)


@pytest.mark.parametrize("kind", ["conv", "tokens"])
def test_each_block_of_a_chain_has_two_layers_and_all_but_the_last_are_pruned(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_walk, "WIDTHS", {kind: 16})
    monkeypatch.setattr(bench_walk, "SIZES", {kind: (16, 4, 4) if kind == "conv" else (4, 16)})
    told: list[int] = []

    def noted(*args: Any, **options: Any) -> PrunedGraph:
        done = sparsify_graph(*args, **options)
        told.append(sum(layer.pattern is not None for layer in done.layers))
        return done

    monkeypatch.setattr(bench_walk, "sparsify_graph", noted)
    assert len(bench_walk.pruning(kind, 3, 32, "reconstruction", rounds=2)) == 2
    assert told == [5, 5]
