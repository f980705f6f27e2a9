"""Channel orders: valid, never worse than none, repeatable, and as good as they should be."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.bench_permutation import MATRICES, main
from sparse_export.sparsity import permute
from sparse_export.sparsity.pattern import NMPattern, groups_over
from sparse_export.sparsity.permute import Objective, find_permutation

TWO_FOUR = NMPattern(n=2, m=4)
OBJECTIVES: tuple[Objective, ...] = ("magnitude", "groups")


def _cut(weight_OI: Tensor, pattern: NMPattern) -> float:
    """What the pattern cuts, group by group, with a sort."""
    groups = weight_OI.abs().double().reshape(-1, pattern.m)
    return float(groups.sort(dim=1).values[:, : pattern.m - pattern.n].sum())


def _kept_share(weight_OI: Tensor, pattern: NMPattern = TWO_FOUR) -> float:
    return 1 - _cut(weight_OI, pattern) / float(weight_OI.abs().double().sum())


def _loss(weight_OI: Tensor, pattern: NMPattern, objective: Objective) -> tuple[float, ...]:
    """What the objective wants small, the first first."""
    cut = _cut(weight_OI, pattern)
    return (cut,) if objective == "magnitude" else (float(groups_over(weight_OI, 1, pattern)), cut)


def _smallest_loss(weight_OI: Tensor, pattern: NMPattern, objective: Objective) -> tuple[float, ...]:
    """The best over all ways to split the columns into groups, by trying each."""

    def splits(columns: tuple[int, ...]) -> list[list[int]]:
        if not columns:
            return [[]]
        first, rest = columns[0], columns[1:]
        return [
            [first, *others, *tail]
            for others in itertools.combinations(rest, pattern.m - 1)
            for tail in splits(tuple(c for c in rest if c not in others))
        ]

    return min(
        _loss(weight_OI[:, order], pattern, objective) for order in splits(tuple(range(weight_OI.shape[1])))
    )


def _planted(n_rows: int, n_columns: int, density: float, seed: int) -> Tensor:
    """A matrix that obeys 2:4, its columns shuffled."""
    rng = np.random.default_rng(seed)
    groups = np.zeros((n_rows, n_columns // 4, 4))
    slots = rng.permuted(np.broadcast_to(np.arange(4), groups.shape), axis=2)[..., :2]
    values = rng.standard_normal(slots.shape) * (rng.random(slots.shape) < 2 * density)
    np.put_along_axis(groups, slots, values, axis=2)
    return torch.from_numpy(groups.reshape(n_rows, n_columns)[:, rng.permutation(n_columns)]).float()


def _matrix(name: str, n: int) -> Tensor:
    return torch.from_numpy(MATRICES[name](n)).float()


def _gauss(n: int) -> Tensor:
    return _matrix("gauss", n)


@st.composite
def _weights(draw: st.DrawFn) -> tuple[Tensor, NMPattern]:
    m = draw(st.integers(2, 6))
    pattern = NMPattern(n=draw(st.integers(1, m - 1)), m=m)
    shape = (draw(st.integers(0, 7)), m * draw(st.integers(1, 5)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if draw(st.booleans()):
        # Few values: ties, zeros, equal columns, columns of nothing but zeros.
        weight = torch.randint(-2, 3, shape, generator=generator).float()
        return weight * torch.randint(0, 2, shape[1:], generator=generator), pattern
    scale = torch.randn(shape[1], generator=generator).mul(draw(st.sampled_from([0.0, 1.0, 8.0]))).exp()
    return torch.randn(shape, generator=generator) * scale, pattern


@settings(max_examples=60)
@given(_weights(), st.sampled_from(OBJECTIVES), st.integers(0, 12), st.integers(0, 3))
def test_the_order_holds_every_column_once_and_is_never_worse_than_none(
    case: tuple[Tensor, NMPattern], objective: Objective, rounds: int, seed: int
) -> None:
    weight, pattern = case
    before = weight.clone()
    order = find_permutation(weight, pattern, seed=seed, rounds=rounds, objective=objective)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(weight.shape[1]))
    assert torch.equal(weight, before)
    found, none = _loss(weight[:, order], pattern, objective), _loss(weight, pattern, objective)
    rounding = 1e-12 * float(weight.abs().double().sum())
    assert found[:-1] < none[:-1] or (found[:-1] == none[:-1] and found[-1] <= none[-1] + rounding)


@settings(max_examples=30)
@given(_weights(), st.integers(0, 2**31))
def test_a_round_without_noise_never_cuts_more(case: tuple[Tensor, NMPattern], seed: int) -> None:
    weight, pattern = case
    columns = weight.abs().T.contiguous()
    if not columns.any():
        return
    whole = permute._whole_numbers(columns, pattern)
    groups, rng = torch.arange(len(columns)).view(-1, pattern.m), np.random.default_rng(seed)
    cuts = [_cut(whole[groups.flatten()].T, pattern)]
    for _ in range(5):
        groups, _ = permute._round(groups, permute._cut_costs(whole, pattern), 0.0, rng)
        cuts.append(_cut(whole[groups.flatten()].T, pattern))
    assert cuts == sorted(cuts, reverse=True)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_seed_gives_one_order_whatever_the_threads_and_the_global_generators(objective: Objective) -> None:
    weight = _matrix("unstr80", 128).repeat(3, 1) + _gauss(128).mul(_gauss(128) > 2).repeat(3, 1)
    n_threads = torch.get_num_threads()
    orders = []
    try:
        for n, global_seed in ((1, 0), (2, 1), (3, 1)):
            torch.set_num_threads(n)
            torch.manual_seed(global_seed)
            orders.append(find_permutation(weight, TWO_FOUR, seed=5, rounds=120, objective=objective))
    finally:
        torch.set_num_threads(n_threads)
    assert torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(
        orders[0], find_permutation(weight, TWO_FOUR, seed=6, rounds=120, objective=objective)
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("pattern", "n_columns"),
    [
        (TWO_FOUR, 8),
        (TWO_FOUR, 12),
        (NMPattern(n=1, m=2), 8),
        (NMPattern(n=1, m=3), 9),
        (NMPattern(n=3, m=4), 8),
    ],
    ids=str,
)
def test_the_best_split_of_few_columns_is_found(
    pattern: NMPattern, n_columns: int, objective: Objective
) -> None:
    rounds = 60 if objective == "magnitude" else 240
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(6, n_columns, generator=generator)
        weight *= torch.rand(weight.shape, generator=generator) < 0.7
        order = find_permutation(weight, pattern, rounds=rounds, objective=objective)
        assert _loss(weight[:, order], pattern, objective) == pytest.approx(
            _smallest_loss(weight, pattern, objective)
        )


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("n_rows", "n_columns", "seed"), [(300, 256, 0), (128, 512, 1), (64, 32, 2)])
def test_a_shuffled_matrix_of_density_a_tenth_is_put_in_order_without_a_cut(
    n_rows: int, n_columns: int, seed: int, objective: Objective
) -> None:
    weight = _planted(n_rows, n_columns, 0.1, seed)
    assert int(groups_over(weight, 1, TWO_FOUR)) > 0
    order = find_permutation(weight, TWO_FOUR, objective=objective)
    assert int(groups_over(weight[:, order], 1, TWO_FOUR)) == 0


def test_full_groups_that_were_shuffled_are_found_again() -> None:
    weight = _planted(64, 32, 0.5, 3)
    order = find_permutation(weight, TWO_FOUR, objective="groups")
    assert int(groups_over(weight[:, order], 1, TWO_FOUR)) == 0


def test_fewer_groups_are_over_the_cap_by_groups_than_by_magnitude() -> None:
    weight = _planted(256, 128, 0.2, 0)
    by = {objective: find_permutation(weight, TWO_FOUR, objective=objective) for objective in OBJECTIVES}
    n_over = {name: int(groups_over(weight[:, order], 1, TWO_FOUR)) for name, order in by.items()}
    assert n_over["groups"] < 0.7 * n_over["magnitude"]


@pytest.mark.parametrize(
    ("weight", "share"),
    [(_gauss(256), 0.7589), (_matrix("heavysort", 256), 0.8899), (_matrix("unstr80", 256), 1.0)],
    ids=["gauss", "heavysort", "unstr80"],
)
def test_256_columns_keep_at_least_what_pairwise_stripe_search_keeps(weight: Tensor, share: float) -> None:
    order = find_permutation(weight, TWO_FOUR)
    assert round(_kept_share(weight[:, order]), 4) >= share


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weight", "rounds", "share"),
    [
        (_gauss(512), None, 0.7553),
        (_matrix("heavysort", 512), None, 0.8844),
        (_matrix("unstr80", 512), None, 0.9994),
        (_gauss(512), 800, 0.7566),
        (_matrix("unstr80", 512), 800, 1.0),
    ],
    ids=["gauss", "heavysort", "unstr80", "gauss-800", "unstr80-800"],
)
def test_512_columns_keep_more_than_pairwise_stripe_search_keeps(
    weight: Tensor, rounds: int | None, share: float
) -> None:
    order = find_permutation(weight, TWO_FOUR, rounds=rounds)
    assert round(_kept_share(weight[:, order]), 4) >= share


def test_noise_pays_where_every_column_is_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _gauss(128)
    with_noise = find_permutation(weight, TWO_FOUR, rounds=400)
    monkeypatch.setattr(permute, "_NOISE", 0.0)
    without = find_permutation(weight, TWO_FOUR, rounds=400)
    assert _kept_share(weight[:, with_noise]) > _kept_share(weight[:, without])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_more_groups_than_trade_at_once_all_take_part(objective: Objective) -> None:
    n_groups = permute._BLOCK + 30
    weight = _planted(8, 4 * n_groups, 0.2, 1)
    order = find_permutation(weight, TWO_FOUR, rounds=30, objective=objective)
    assert sorted(order.tolist()) == list(range(4 * n_groups))
    assert _cut(weight[:, order], TWO_FOUR) < 0.1 * _cut(weight, TWO_FOUR)
    moved = (order != torch.arange(len(order))).view(-1, 4).any(1)
    assert moved.float().mean() > 0.9


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(5, 8),
        torch.ones(5, 8),
        torch.zeros(0, 8),
        torch.randn(5, 4, generator=torch.Generator().manual_seed(0)),
        torch.eye(8),
        torch.tensor([[1.0, 0, 1, 0, 0, 2, 0, 3]]),
    ],
    ids=["zeros", "all alike", "no rows", "one group", "one a row", "obeys already"],
)
def test_where_no_order_is_better_the_columns_stay(weight: Tensor, objective: Objective) -> None:
    order = find_permutation(weight, TWO_FOUR, rounds=20, objective=objective)
    assert order.tolist() == list(range(weight.shape[1]))


def test_a_search_that_ends_worse_than_it_began_changes_nothing() -> None:
    weight = _gauss(128)
    ordered = weight[:, find_permutation(weight, TWO_FOUR, rounds=800, seed=1)]
    # With so few rounds, noise leads out of a good order and not back.
    order = find_permutation(ordered, TWO_FOUR, rounds=100)
    assert order.tolist() == list(range(128))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_nonzero_too_many_in_one_row_is_moved_away(objective: Objective) -> None:
    weight = torch.tensor([[1.0, 2, 3, 0, 0, 0, 0, 0]])
    order = find_permutation(weight, TWO_FOUR, objective=objective)
    assert int(groups_over(weight[:, order], 1, TWO_FOUR)) == 0


def test_no_rounds_leave_the_columns_where_they_are() -> None:
    weight = _gauss(16)
    assert find_permutation(weight, TWO_FOUR, rounds=0).tolist() == list(range(16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_and_strided_weights_that_need_a_gradient_are_taken(dtype: torch.dtype) -> None:
    weight = _gauss(32).to(dtype).T.requires_grad_()
    order = find_permutation(weight, TWO_FOUR)
    assert torch.equal(order, find_permutation(weight.detach().float().contiguous(), TWO_FOUR))
    assert _cut(weight.detach()[:, order], TWO_FOUR) < _cut(weight.detach(), TWO_FOUR)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_the_scale_of_the_weights_does_not_matter(factor: float) -> None:
    weight = _gauss(32)
    assert torch.equal(
        find_permutation((weight.double() * factor).float(), TWO_FOUR), find_permutation(weight, TWO_FOUR)
    )


def test_two_columns_that_outweigh_all_others_do_not_hide_them() -> None:
    weight = _gauss(64)
    weight[:, [3, 50]] *= 1e7
    order = find_permutation(weight, TWO_FOUR)
    light = weight.clone()
    light[:, [3, 50]] = 0
    assert _kept_share(light[:, order]) > _kept_share(light) + 0.01


@settings(max_examples=40)
@given(st.integers(1, 30), st.data())
def test_the_nth_largest_is_that_of_a_sort(n_columns: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, n_columns))
    generator = torch.Generator().manual_seed(n_columns)
    columns = [torch.randint(0, 9, (3, 4), generator=generator).float() for _ in range(n_columns)]
    expected = torch.stack(columns).sort(dim=0, descending=True).values[n - 1]
    assert torch.equal(permute._nth_largest(columns, n), expected)


@pytest.mark.parametrize("buffer", [1, 40, 1 << 20])
def test_sums_of_the_larger_are_those_of_two_loops(buffer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permute, "_BUFFER", buffer)
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randint(0, 99, (2, 7, 13), generator=generator).float()
    expected = [[float(torch.maximum(a, b).sum()) for b in right] for a in left]
    assert permute._sums_of_larger(left, right).tolist() == expected


@given(_weights())
def test_whole_numbers_stay_exact_and_hide_no_nonzero(case: tuple[Tensor, NMPattern]) -> None:
    weight, pattern = case
    columns = weight.abs().T.contiguous()
    if not columns.any():
        return
    whole = permute._whole_numbers(columns, pattern)
    assert torch.equal(whole, whole.round())
    assert torch.equal(whole != 0, columns != 0)
    heaviest = whole.double().sum(1).max()
    assert heaviest * (1 + (pattern.m - 1) / pattern.n) <= 2**24 + columns.shape[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    weight = torch.ones(2, 8)
    weight[1, 3] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        find_permutation(weight, TWO_FOUR)


@pytest.mark.parametrize("n_columns", [0, 3, 30])
def test_columns_that_m_does_not_divide_are_refused_with_their_number(n_columns: int) -> None:
    with pytest.raises(ValueError, match=f"{n_columns} input columns; 2:4 needs a multiple of 4"):
        find_permutation(torch.ones(2, n_columns), TWO_FOUR)


@pytest.mark.parametrize("weight", [torch.ones(8), torch.ones(2, 8, 3), torch.ones(2, 8, dtype=torch.int64)])
def test_what_is_no_matrix_of_floats_is_refused_with_its_shape(weight: Tensor) -> None:
    with pytest.raises(ValueError, match=r"of shape .*floats of shape \(O, I\)"):
        find_permutation(weight, TWO_FOUR)


def test_negative_effort_or_seed_and_unknown_objectives_are_refused() -> None:
    weight = torch.ones(2, 8)
    with pytest.raises(ValueError, match="rounds is -1"):
        find_permutation(weight, TWO_FOUR, rounds=-1)
    with pytest.raises(ValueError, match="seed is -3"):
        find_permutation(weight, TWO_FOUR, seed=-3)
    with pytest.raises(ValueError, match="'speed'; one of magnitude, groups"):
        find_permutation(weight, TWO_FOUR, objective="speed")  # type: ignore[arg-type]


def test_the_benchmark_writes_what_it_measured(tmp_path: Path) -> None:
    weights = {
        "fc.weight": _gauss(24),
        "conv.weight": _gauss(12).view(3, 12, 2, 2),
        "odd.weight": torch.ones(2, 6),
    }
    save_file(weights, tmp_path / "model.safetensors")
    save_file({name: w != 0 for name, w in weights.items()}, tmp_path / "masks.safetensors")
    file = tmp_path / "figures.json"
    main(["--matrix", "gauss", "--size", "32", "--rounds", "20", "--run", str(tmp_path), "--json", str(file)])
    figures = json.loads(file.read_text())
    (row,) = figures["matrices"]
    assert row["before"] == pytest.approx(_kept_share(_gauss(32)))
    assert row["before"] < row["after"] < row["rows50"]
    assert [(layer["layer"], layer["rows"], layer["columns"]) for layer in figures["layers"]] == [
        ("conv.weight", 12, 12),
        ("conv.weight", 12, 12),
        ("fc.weight", 24, 24),
        ("fc.weight", 24, 24),
    ]
    assert all(layer["over_before"] == layer["n_groups"] for layer in figures["layers"])
