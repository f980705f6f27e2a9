"""How far a call is that prunes layer after layer."""

from __future__ import annotations

import pytest

from sparse_export.graph.model import signature_of
from sparse_export.oneshot.costs import LayerDone, costs_of
from sparse_export.oneshot.graph_pruning import sparsify_graph
from sparse_export.oneshot.graph_weights import weights_of_graph
from sparse_export.oneshot.layers import Method
from sparse_export.oneshot.wiring import wiring_of
from sparse_export.sparsity.pattern import NMPattern
from tests.oneshot.graphs import drawn, model_from

TWO_FOUR = NMPattern(n=2, m=4)
MIXED = model_from(
    """(float[N,8,H,H] x) => (float[N,4] y) {
        a = Conv<pads=[1,1,1,1]>(x, conv)
        b = Relu(a)
        c = GlobalAveragePool(b)
        d = Flatten(c)
        e = MatMul(d, narrow)
        f = Relu(e)
        g = MatMul(f, wide)
        h = Relu(g)
        y = MatMul(h, last)
    }""",
    conv=drawn(16, 8, 3, 3),
    narrow=drawn(16, 64),
    wide=drawn(64, 256),
    last=drawn(256, 4),
)


def costs(method: Method, *shape: int, n_batches: int = 1) -> dict[str, float]:
    weights = weights_of_graph(MIXED, wiring_of(MIXED), TWO_FOUR, planned_dense={}).pruned
    return costs_of(MIXED, weights, [{"x": drawn(*shape)}] * n_batches, method)


def test_a_layer_costs_its_products_with_the_inputs_and_their_gram_matrix() -> None:
    """A convolution of K = 72 columns and 16 outputs at 2 x 10 x 10 places, three times over."""
    found = costs("activation", 2, 8, 10, 10, n_batches=3)
    n_inputs = 3 * 2 * 10 * 10
    assert found["conv"] == pytest.approx(16 * 72 + n_inputs * (72 * 16 + 72**2 / 2) + 16 * 72**2)
    assert found["narrow"] == pytest.approx(64 * 16 + 6 * (64 * 16 + 16**2 / 2) + 64 * 16**2)
    larger = costs("reconstruction", 2, 8, 10, 10, n_batches=3)
    solved = 8 * 16 * 36**3 / 3  # Cholesky factors in float64, in multiply-adds of conjugate gradients
    assert larger["conv"] == pytest.approx(found["conv"] + 2 * 72**3 + solved)


def test_without_a_walk_a_layer_costs_its_weights() -> None:
    weights = weights_of_graph(MIXED, wiring_of(MIXED), TWO_FOUR, planned_dense={}).pruned
    found = costs_of(MIXED, weights, (), "magnitude")
    assert found == {"conv": 16 * 72.0, "narrow": 16 * 64.0, "wide": 64 * 256.0}


def test_each_layer_is_told_with_the_share_of_the_work_and_the_last_with_all_of_it() -> None:
    told: list[LayerDone] = []
    batches = [{"x": drawn(2, 8, 10, 10)}]
    sparsify_graph(
        MIXED,
        signature=signature_of(MIXED),
        batches=batches,
        pattern=TWO_FOUR,
        method="reconstruction",
        planned_dense={},
        observer=told.append,
    )
    assert [(one.layer.name, one.number, one.n_layers) for one in told] == [
        ("conv", 1, 3),
        ("narrow", 2, 3),
        ("wide", 3, 3),
    ]
    wanted = costs("reconstruction", 2, 8, 10, 10)
    total = sum(wanted.values())
    assert told[0].share == pytest.approx(wanted["conv"] / total)
    assert told[1].share == pytest.approx(1 - wanted["wide"] / total)
    assert told[2].share == 1.0
