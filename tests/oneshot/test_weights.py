"""One-shot pruning to N:M, against slow and obvious forms of the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_export.oneshot import weights
from sparse_export.oneshot.weights import (
    by_activation,
    by_magnitude,
    by_reconstruction,
    columns_from_weight,
    kept_share,
    least_squares,
    relative_error,
    row_errors,
    weight_from_columns,
)
from sparse_export.sparsity.pattern import NMPattern, obeys

TWO_FOUR = NMPattern(n=2, m=4)


def layer(seed: int, n_outputs: int, n_columns: int, n_samples: int = 40) -> tuple[Tensor, Tensor]:
    """A weight (O, K) and inputs (samples, K) that hang together, some of which are never on."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_outputs, n_columns, generator=generator)
    mixing = torch.randn(n_columns, n_columns, generator=generator)
    inputs = torch.randn(n_samples, n_columns, generator=generator) @ mixing
    inputs[:, :: max(3, n_columns // 3)] = 0
    return weight, inputs.double()


layers = st.builds(
    layer, st.integers(0, 10**6), st.integers(1, 5), st.sampled_from([4, 8, 12, 40]), st.integers(1, 60)
)


@given(layers, st.sampled_from([TWO_FOUR, NMPattern(n=1, m=4), NMPattern(n=1, m=2)]))
def test_activation_keeps_the_largest_products_of_each_group(
    made: tuple[Tensor, Tensor], pattern: NMPattern
) -> None:
    weight, inputs = made
    norms = inputs.square().sum(0)
    found = by_activation(weight, norms, pattern)
    for row, mask in zip(weight.tolist(), found.mask.tolist(), strict=True):
        for start in range(0, len(row), pattern.m):
            place = range(start, start + pattern.m)
            score = {j: (abs(row[j]) * float(norms[j]) ** 0.5, abs(row[j])) for j in place}
            kept = {j for j in place if mask[j]}
            assert len(kept) == pattern.n
            assert min(score[j] for j in kept) >= max(score[j] for j in place if j not in kept)
    assert torch.equal(found.weight, weight * found.mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_of_weights_whose_inputs_were_never_on_activation_keeps_the_larger(dtype: torch.dtype) -> None:
    weight = torch.tensor([[0.01, -0.02, 0.03, -0.04], [4.0, 1.0, 2.0, 3.0]], dtype=dtype)
    found = by_activation(weight, torch.zeros(4, dtype=torch.float64), TWO_FOUR)
    assert found.mask.tolist() == [[False, False, True, True], [True, False, False, True]]


@given(layers)
@settings(max_examples=60)
def test_reconstruction_is_two_four_and_in_no_row_worse_than_magnitude(made: tuple[Tensor, Tensor]) -> None:
    weight, inputs = made
    gram = inputs.T @ inputs
    found = by_reconstruction(weight, gram, TWO_FOUR)
    plain = by_magnitude(weight, TWO_FOUR)
    assert obeys(found.mask, 1, TWO_FOUR)
    assert not (found.weight[~found.mask] != 0).any()
    wanted = inputs @ weight.double().T
    error = (inputs @ found.weight.double().T - wanted).square().sum(0)
    bar = (inputs @ plain.weight.double().T - wanted).square().sum(0)
    assert bool((error <= bar * (1 + 1e-9) + 1e-9 * wanted.square().sum(0)).all())


def test_reconstruction_loses_much_less_than_magnitude_where_inputs_hang_together() -> None:
    weight, inputs = layer(3, 32, 64, n_samples=48)
    gram = inputs.T @ inputs
    found = relative_error(weight, by_reconstruction(weight, gram, TWO_FOUR).weight, gram)
    plain = relative_error(weight, by_magnitude(weight, TWO_FOUR).weight, gram)
    assert found < 0.5 * plain


@given(layers)
@settings(max_examples=40)
def test_the_kept_weights_are_the_least_squares_optimum(made: tuple[Tensor, Tensor]) -> None:
    weight, inputs = made
    n_columns = weight.shape[1]
    # Rows of identity below the inputs are what damping adds to the Gram matrix.
    inputs = torch.cat([inputs, 0.1 * torch.eye(n_columns, dtype=torch.float64)])
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(n_columns)) < 0.5
    found = least_squares(weight, mask, inputs.T @ inputs)
    for row, kept, got in zip(weight.double(), mask, found, strict=True):
        solution = torch.linalg.lstsq(inputs[:, kept], inputs @ row).solution if kept.any() else row[:0]
        assert torch.allclose(got[kept], solution, rtol=1e-6, atol=1e-7 * (1 + float(row.abs().max())))
        assert not got[~kept].any()


def test_rows_solved_in_chunks_are_those_solved_together(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = layer(1, 9, 16)
    mask = by_magnitude(weight, TWO_FOUR).mask
    gram = inputs.T @ inputs + torch.eye(16)
    together = least_squares(weight, mask, gram)
    monkeypatch.setattr(weights, "_CHUNK", 1)
    assert torch.allclose(least_squares(weight, mask, gram), together, rtol=1e-12, atol=1e-12)


def plain_sweep(weight: Tensor, gram: Tensor, pattern: NMPattern) -> tuple[Tensor, Tensor]:
    """The sweep as the inverse of the Gram matrix of the columns still open says it, inverted anew each
    time.
    """
    weight, mask = weight.double().clone(), torch.zeros_like(weight, dtype=torch.bool)
    for j in range(weight.shape[1]):
        inverse = torch.linalg.inv(gram[j:, j:])
        if j % pattern.m == 0:
            # What a column costs when it goes once those before it in the group are settled.
            settled = [torch.linalg.inv(gram[k:, k:])[0, 0] for k in range(j, j + pattern.m)]
            cost = weight[:, j : j + pattern.m] ** 2 / torch.stack(settled)
            order = cost.argsort(dim=1, descending=True, stable=True)[:, : pattern.n]
            mask[:, j : j + pattern.m] = torch.zeros_like(cost, dtype=torch.bool).scatter(1, order, True)
        gone = torch.where(mask[:, j], 0, weight[:, j])
        weight[:, j:] -= gone[:, None] / inverse[0, 0] * inverse[0]
        weight[:, j] = torch.where(mask[:, j], weight[:, j], 0)
    return weight, mask


@pytest.mark.parametrize("block", [4, 8, 128])
def test_the_sweep_is_that_of_the_inverse_of_what_is_still_open(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_BLOCK", block)
    weight, inputs = layer(5, 6, 24)
    gram = inputs.T @ inputs + 0.3 * torch.eye(24)
    found = weights._sweep(weight.double(), gram, TWO_FOUR, torch.ones_like(weight, dtype=torch.bool))
    wanted, mask = plain_sweep(weight, gram, TWO_FOUR)
    assert torch.equal(found.mask, mask)
    assert torch.allclose(found.weight, wanted, rtol=1e-8, atol=1e-8)


def test_what_is_not_allowed_stays_zero_whatever_the_method() -> None:
    weight, inputs = layer(2, 7, 16)
    allowed = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    weight = weight * allowed
    gram = inputs.T @ inputs
    for found in (
        by_magnitude(weight, TWO_FOUR, allowed=allowed),
        by_activation(weight, gram.diagonal(), TWO_FOUR, allowed=allowed),
        by_reconstruction(weight, gram, TWO_FOUR, allowed=allowed),
    ):
        assert not (found.mask & ~allowed).any()
        assert not (found.weight != 0)[~found.mask].any()
        assert obeys(found.mask, 1, TWO_FOUR)


def test_too_much_work_for_least_squares_leaves_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = layer(4, 8, 16)
    gram = inputs.T @ inputs
    best = row_errors(weight, by_reconstruction(weight, gram, TWO_FOUR).weight, gram).sum()
    monkeypatch.setattr(weights, "_ITERATIONS", 0)
    monkeypatch.setattr(weights, "least_squares", None)
    swept = row_errors(weight, by_reconstruction(weight, gram, TWO_FOUR).weight, gram).sum()
    assert best < swept


def test_inputs_that_are_all_zero_leave_magnitude() -> None:
    weight, _ = layer(6, 3, 8)
    found = by_reconstruction(weight, torch.zeros(8, 8, dtype=torch.float64), TWO_FOUR)
    assert torch.equal(found.mask, by_magnitude(weight, TWO_FOUR).mask)
    assert torch.allclose(found.weight, weight * found.mask)


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 3), (4, 8, 3, 2), (2, 4, 2, 1, 3)])
def test_a_weight_goes_to_columns_and_back(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    columns = columns_from_weight(weight)
    assert torch.equal(weight_from_columns(columns, shape), weight)
    mask = by_magnitude(columns, TWO_FOUR).mask
    assert obeys(weight_from_columns(mask, shape), 1, TWO_FOUR)


def test_shares_and_errors_of_nothing_are_defined() -> None:
    nothing = torch.zeros(2, 4)
    assert kept_share(nothing, nothing.bool()) == 1.0
    assert relative_error(nothing, nothing, torch.eye(4, dtype=torch.float64)) == 0.0
    assert kept_share(torch.tensor([[3.0, 1.0]]), torch.tensor([[True, False]])) == 0.75


def test_a_row_whose_correction_overflows_its_type_goes_back_to_magnitude() -> None:
    """Inputs that are alike: the two weights that are kept take on what the two others lose."""
    weight = torch.full((3, 8), 60000.0, dtype=torch.float16)
    gram = torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)).double()
    found = by_reconstruction(weight, gram, TWO_FOUR)
    assert torch.equal(found.weight, by_magnitude(weight, TWO_FOUR).weight)


@pytest.mark.parametrize("seed", [0, 1])
def test_conjugate_gradients_come_to_the_least_squares_optimum_or_near_it(seed: int) -> None:
    """Inputs that go together, as those of real layers do, so that the system is badly conditioned."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(300, 96, generator=generator, dtype=torch.float64).cumsum(1)
    gram = mixed.T @ mixed / 300 + 0.01 * torch.eye(96, dtype=torch.float64)
    weight = torch.randn(12, 96, generator=generator)
    swept = weights._sweep(weight.double(), gram, TWO_FOUR, torch.ones_like(weight, dtype=torch.bool))
    best = weights.least_squares(weight, swept.mask, gram)
    found = weights.by_gradients(weight.double(), swept, gram)
    assert not bool(found[~swept.mask].any())
    errors = [float(weights.row_errors(weight, one, gram).sum()) for one in (swept.weight, found, best)]
    assert errors[2] <= errors[1] * (1 + 1e-9) <= errors[0]
    assert errors[0] - errors[1] > 0.9 * (errors[0] - errors[2])  # nearly all there is to gain
    each = [weights.row_errors(weight, one, gram) for one in (found, swept.weight)]
    assert bool((each[0] <= each[1]).all())


def test_a_layer_for_which_few_iterations_are_all_there_is_time_for_keeps_its_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weights, "_GRADIENTS_WORK", 1.0)
    weight, gram = torch.randn(4, 8), torch.eye(8, dtype=torch.float64)
    swept = weights.by_magnitude(weight, TWO_FOUR)
    assert torch.equal(weights.by_gradients(weight.double(), swept, gram), swept.weight.double())


def test_the_factor_of_the_inverse_is_that_of_separate_steps() -> None:
    _, inputs = layer(3, 2, 40, n_samples=90)
    gram = inputs.mT @ inputs + torch.eye(40, dtype=torch.float64)
    before = gram.clone()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    wanted = torch.linalg.cholesky(inverse, upper=True)
    found = weights._factor_of_inverse(gram)
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)
    assert torch.equal(gram, before)
    assert torch.equal(found, found.triu())
