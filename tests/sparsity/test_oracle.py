"""The update against the loop version in oracle.py, on layers full of ties."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from sparse_export.sparsity import Redistribution
from sparse_export.sparsity.redistribute import growth_budgets
from tests.sparsity import oracle
from tests.sparsity.oracle import Layer
from tests.sparsity.strategies import DTYPES, inputs_from_layers, rates, redistributions, tied_layers

FULL = Layer(weight=[1.0] * 6, score=[1.0] * 6, mask=[True] * 6)
EMPTY = Layer(weight=[1.0] * 6, score=[1.0] * 6, mask=[False] * 6)
STILL = Layer(weight=[1.0, -1.0] * 3, score=[0.0, -0.0] * 3, mask=[True, True, True, False, False, False])


@given(tied_layers(), rates, redistributions, st.sampled_from(DTYPES))
@example([FULL], 1.0, "momentum", torch.float32)
@example([EMPTY], 0.5, "momentum", torch.float32)
@example([STILL], 0.5, "momentum", torch.float32)
@example([FULL, EMPTY, STILL], 0.5, "momentum", torch.float32)
@example([FULL, EMPTY, STILL], 0.5, "none", torch.float32)
def test_the_update_equals_the_loop_version(
    layers: list[Layer], rate: float, redistribution: Redistribution, dtype: torch.dtype
) -> None:
    result = inputs_from_layers(layers, dtype).update(rate, redistribution)

    shares = oracle.shares(layers, redistribution, rate)
    assert [float(share) for share in result.shares.values()] == pytest.approx(
        [float(share) for share in shares], rel=1e-12
    )
    used = [float(used) for used in result.prune_rates.values()]
    plain = oracle.prune_rates(layers, shares, rate, redistribution)
    for n, (layer, expected) in enumerate(zip(layers, plain, strict=True)):
        # A share of exactly the average may be rounded to either side of it.
        is_average = shares[n] * len(layers) == 1 and oracle.is_crowded(layer)
        assert used[n] in ((rate, oracle.spared_rate(layer, rate)) if is_average else (expected,))

    removed = [oracle.n_removed(layer, used[n]) for n, layer in enumerate(layers)]
    assert [int(n) for n in result.n_removed.values()] == removed
    pruned = [
        oracle.largest(layer.weight, layer.mask, layer.n_active - removed[n])
        for n, layer in enumerate(layers)
    ]
    assert [mask.tolist() for mask in result.pruned.values()] == pruned

    capacity = [len(mask) - sum(mask) for mask in pruned]
    budgets, is_tie = oracle.whole_budgets(oracle.ideal_budgets(shares, sum(removed), capacity), sum(removed))
    grown = [int(n) for n in result.n_grown.values()]
    if is_tie:
        assert sum(grown) == sum(budgets)
        assert all(abs(got - expected) <= 1 for got, expected in zip(grown, budgets, strict=True))
    else:
        assert grown == budgets

    for mask, kept, layer, budget in zip(result.masks.values(), pruned, layers, grown, strict=True):
        born = oracle.largest(layer.score, [not is_kept for is_kept in kept], budget)
        assert mask.tolist() == [a or b for a, b in zip(kept, born, strict=True)]


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 40)), min_size=1, max_size=8),
    st.floats(0, 1),
)
@example([(1, 0), (1, 3)], 0.5)
def test_the_budgets_equal_handing_out_the_excess_round_by_round(
    claims_and_capacity: list[tuple[int, int]], part: float
) -> None:
    claims = [claim for claim, _ in claims_and_capacity]
    capacity = [places for _, places in claims_and_capacity]
    assume(sum(claims) > 0)
    share = [Fraction(claim, sum(claims)) for claim in claims]
    total = int(part * sum(capacity))
    budgets = growth_budgets(
        torch.tensor([float(p) for p in share], dtype=torch.float64),
        torch.tensor(total),
        torch.tensor(capacity),
    ).tolist()
    assert sum(budgets) == total
    expected, is_tie = oracle.whole_budgets(oracle.ideal_budgets(share, total, capacity), total)
    if is_tie:
        assert all(abs(got - exact) <= 1 for got, exact in zip(budgets, expected, strict=True))
        assert all(0 <= got <= places for got, places in zip(budgets, capacity, strict=True))
    else:
        assert budgets == expected


@pytest.mark.parametrize(
    ("n_active", "used"),
    [(80, 0.5), (81, 0.19), (95, 0.05), (100, 0.0)],
    ids=["a-fifth-free", "less-than-a-fifth-free", "a-twentieth-free", "full"],
)
def test_a_nearly_full_layer_that_attracts_weights_loses_at_most_its_free_fraction(
    n_active: int, used: float
) -> None:
    full = Layer(weight=[1.0] * 100, score=[9.0] * 100, mask=[True] * n_active + [False] * (100 - n_active))
    other = Layer(weight=[1.0] * 100, score=[1.0] * 100, mask=[True] * 10 + [False] * 90)
    result = inputs_from_layers([full, other]).update(0.5)
    assert [float(rate) for rate in result.prune_rates.values()] == [used, 0.5]


@pytest.mark.parametrize("n_layers", [2, 3, 5, 6, 7])
def test_of_equal_layers_the_earlier_ones_get_the_remainder(n_layers: int) -> None:
    layer = Layer(weight=[1.0] * 10, score=[0.1] * 10, mask=[True] * 3 + [False] * 7)
    odd = Layer(weight=[1.0] * 10, score=[0.0] * 10, mask=[True] * 1 + [False] * 9)
    result = inputs_from_layers([layer] * n_layers + [odd], torch.float64).update(0.3)
    assert [int(n) for n in result.n_grown.values()] == [2] + [1] * (n_layers - 1) + [0]


def test_the_excess_of_full_layers_is_spread_equally_over_the_rest() -> None:
    # Shares 20/23, 2/23 and 1/23 of 11 removed; the first layer has 2 + 2 places and leaves 5.565 over.
    greedy = Layer(weight=[1.0] * 6, score=[20.0] * 6, mask=[True] * 4 + [False] * 2)
    others = [
        Layer(weight=[1.0] * 100, score=[score] * 100, mask=[True] * n + [False] * (100 - n))
        for score, n in ((2.0, 10), (1.0, 8))
    ]
    result = inputs_from_layers([greedy, *others]).update(0.5)
    assert [int(n) for n in result.n_removed.values()] == [2, 5, 4]
    # 0.957 + 2.783 and 0.478 + 2.783 of 7, by largest remainder.
    assert [int(n) for n in result.n_grown.values()] == [4, 4, 3]


def test_a_layer_fills_up_wholly_before_others_get_its_excess() -> None:
    greedy = Layer(weight=[1.0] * 4, score=[100.0] * 4, mask=[True, False, False, False])
    poor = Layer(weight=[1.0] * 50, score=[0.001] * 50, mask=[True] * 40 + [False] * 10)
    result = inputs_from_layers([greedy, poor]).update(0.5)
    assert result.masks["layer0"].tolist() == [True] * 4


def test_a_small_prune_rate_never_makes_the_layers_dense() -> None:
    # The reference's budget turns negative here, and its masks full.
    generator = torch.Generator().manual_seed(0)
    inputs = inputs_from_layers(
        [
            Layer(
                weight=torch.randn(400, generator=generator).tolist(),
                score=torch.randn(400, generator=generator).tolist(),
                mask=(torch.rand(400, generator=generator) < 0.05).tolist(),
            )
            for _ in range(3)
        ]
    )
    for _ in range(50):
        result = inputs.update(0.005)
        inputs = type(inputs)(weights=inputs.weights, scores=inputs.scores, masks=result.masks)
        assert all(int(mask.sum()) < 100 for mask in result.masks.values())
