from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from sparse_export.errors import SparseExportError
from sparse_export.sparsity.compressed import expanded, gather, kept_columns, learned_places, places
from sparse_export.sparsity.pattern import NMPattern, largest_per_group, obeys

PATTERN = NMPattern(n=2, m=4)


def _mask(n_out: int, n_in: int, seed: int, *, share: float = 1.0) -> Tensor:
    """At most two of every four along the second axis; a share of them is kept."""
    generator = torch.Generator().manual_seed(seed)
    mask = largest_per_group(torch.rand((n_out, n_in), generator=generator), 1, PATTERN)
    return mask & (torch.rand((n_out, n_in), generator=generator) < share)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6), st.sampled_from([1.0, 0.6, 0.0]))
def test_gathering_and_expanding_give_the_masked_weight_back(
    n_out: int, n_groups: int, seed: int, share: float
) -> None:
    mask = _mask(n_out, 4 * n_groups, seed, share=share)
    weight = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed)) * mask
    columns = kept_columns(mask)
    values = torch.empty(columns.numel())
    gather(values, weight, places(columns, mask.shape[1]))
    assert torch.equal(expanded(values.view(columns.shape), columns, mask.shape[1]), weight)


@given(st.integers(0, 10**6), st.sampled_from([1.0, 0.5]))
def test_two_columns_of_each_group_are_stored_in_order_and_hold_the_mask(seed: int, share: float) -> None:
    mask = _mask(5, 16, seed, share=share)
    columns = kept_columns(mask)
    pairs = columns.view(5, 4, 2)
    assert (pairs // 4 == torch.arange(4)[None, :, None]).all()
    assert (pairs[..., 0] < pairs[..., 1]).all()
    stored = torch.zeros_like(mask).scatter_(1, columns, True)
    assert obeys(stored, 1, PATTERN)
    assert not (mask & ~stored).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("share", [1.0, 0.6])
def test_values_lie_as_torchs_own_packing_puts_them(dtype: torch.dtype, share: float) -> None:
    mask = _mask(64, 128, 4, share=share)
    weight = (torch.randint(1, 100, mask.shape, generator=torch.Generator().manual_seed(0)) * mask).to(dtype)
    packed, _ = sparse_semi_structured_from_dense_cutlass(weight)
    values = torch.empty(mask.numel() // 2, dtype=dtype)
    gather(values, weight, places(kept_columns(mask), 128))
    assert torch.equal(values.view(packed.shape), packed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8, torch.float32])
def test_places_are_learned_from_a_layout_of_any_order(dtype: torch.dtype) -> None:
    mask = _mask(48, 64, 9, share=0.7)
    columns = kept_columns(mask)
    order = torch.randperm(columns.numel(), generator=torch.Generator().manual_seed(1))

    def shuffling(dense: Tensor) -> Tensor:
        return dense.gather(1, columns).flatten()[order]

    assert torch.equal(learned_places(shuffling, mask, dtype), places(columns, 64)[order])


def test_a_layout_that_loses_a_value_is_refused() -> None:
    mask = _mask(16, 16, 2)
    columns = kept_columns(mask)

    def forgetful(dense: Tensor) -> Tensor:
        values = dense.gather(1, columns).flatten()
        values[3] = values[4]
        return values

    with pytest.raises(SparseExportError, match="in a known way"):
        learned_places(forgetful, mask, torch.float16)


def test_a_mask_of_three_in_a_group_is_refused_with_their_number() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 1, 1, 0, 0]], dtype=torch.bool)
    with pytest.raises(ValueError, match="1 groups"):
        kept_columns(mask)
