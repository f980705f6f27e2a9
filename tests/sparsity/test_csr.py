from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_export.sparsity.csr import (
    csr_form,
    gather,
    gradient_at,
    multiply,
    multiply_transposed,
    scatter,
)


@given(
    n_out=st.integers(1, 9),
    n_in=st.integers(1, 9),
    n_rows=st.integers(1, 5),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31 - 1),
)
def test_the_three_products_are_those_of_the_masked_matrix(
    n_out: int, n_in: int, n_rows: int, density: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand((n_out, n_in), generator=generator) < density
    weight = torch.randn((n_out, n_in), generator=generator, dtype=dtype) * mask
    x_IN = torch.randn((n_in, n_rows), generator=generator, dtype=dtype)
    gy_ON = torch.randn((n_out, n_rows), generator=generator, dtype=dtype)
    form = csr_form(mask)
    values = gather(form, weight)
    assert form.n_active == int(mask.sum())
    torch.testing.assert_close(multiply(form, values, x_IN), weight @ x_IN)
    torch.testing.assert_close(multiply_transposed(form, values, gy_ON), weight.t() @ gy_ON)
    torch.testing.assert_close(gradient_at(form, gy_ON, x_IN), (gy_ON @ x_IN.t())[mask])


@given(n_out=st.integers(1, 9), n_in=st.integers(1, 9), seed=st.integers(0, 2**31 - 1))
def test_scattering_what_was_gathered_changes_nothing_and_other_entries_stay(
    n_out: int, n_in: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand((n_out, n_in), generator=generator) < 0.3
    dense = torch.randn((n_out, n_in), generator=generator)
    wanted = torch.where(mask, dense + 1, dense)
    form = csr_form(mask)
    scatter(form, gather(form, dense) + 1, dense)
    assert torch.equal(dense, wanted)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(4, dtype=torch.bool),
        torch.ones(4, 4),
        torch.ones(4, 4, dtype=torch.bool, device="meta"),
        torch.ones(1, 1, dtype=torch.bool).expand(2**16, 2**15),
    ],
)
def test_masks_that_have_no_form_are_refused(mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected"):
        csr_form(mask)
