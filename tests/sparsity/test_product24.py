from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from sparse_export.errors import MissingCapability, UsageError
from sparse_export.models.search24 import best_algorithms
from sparse_export.sparsity import cusparselt, product24
from sparse_export.sparsity.pattern import NMPattern, largest_per_group
from sparse_export.sparsity.product24 import (
    BACKENDS,
    DEFAULT,
    Backend,
    Compressed,
    compress,
    fill,
    multiply,
    multiply_integers,
    quantized_rows,
    require_backend,
    row_multiple,
    why_not,
)
from sparse_export.sparsity.transposable import transposable_mask


def _weight(n_out: int, n_in: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn((n_out, n_in), generator=generator)
    mask = largest_per_group(dense, 1, NMPattern(n=2, m=4))
    return dense * mask, mask


def _times(x: Tensor, made: Compressed, bias: Tensor | None = None) -> Tensor:
    return multiply(x, made.packed, made.meta, bias, shape=made.shape, backend=made.backend)


@given(st.integers(0, 9), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(0, 1000))
def test_the_reference_multiplies_as_the_dense_weight_does(
    n_rows: int, n_out: int, n_groups: int, with_bias: bool, seed: int
) -> None:
    weight, mask = _weight(n_out, 4 * n_groups, seed)
    made = compress(mask, torch.float32, "reference")
    fill(made, weight)
    x, bias = torch.randn(n_rows, 4 * n_groups), torch.randn(n_out) if with_bias else None
    torch.testing.assert_close(_times(x, made, bias), torch.nn.functional.linear(x, weight, bias))


def test_a_transposed_matrix_is_filled_from_the_memory_of_the_weight_itself() -> None:
    scores = torch.randn(16, 24)
    mask = transposable_mask(scores)
    weight = scores * mask
    made = compress(mask, torch.float32, "reference", transposed=True)
    fill(made, weight)
    gy = torch.randn(5, 16)
    assert made.shape == (24, 16)
    torch.testing.assert_close(_times(gy, made), gy @ weight)


def test_new_values_under_an_old_mask_need_no_new_compression() -> None:
    weight, mask = _weight(8, 16)
    made = compress(mask, torch.bfloat16, "reference")
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    assert not _times(x, made).any()
    for factor in (1.0, -3.0):
        fill(made, factor * weight)
        wanted = x @ (factor * weight).to(torch.bfloat16).T
        torch.testing.assert_close(_times(x, made), wanted)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_cutlass_matrices_hold_what_torchs_own_packing_of_the_weight_holds(
    dtype: torch.dtype, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product24, "require_backend", lambda *_: None)  # packing is the same on the CPU
    scores = 20 * torch.randn(128, 128)
    scores += (
        scores.sign()
    )  # no kept value becomes zero as an integer, which the packing would count as pruned
    mask = transposable_mask(scores)
    weight = (scores * mask).to(dtype)
    made = compress(mask, dtype, "cutlass", transposed=transposed)
    fill(made, weight)
    wanted = weight.T.contiguous() if transposed else weight
    packed, meta = sparse_semi_structured_from_dense_cutlass(wanted)
    assert made.meta is not None
    assert torch.equal(made.packed, packed)
    assert torch.equal(made.meta, meta)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(made.packed, made.meta), wanted)


def test_cusparselt_values_go_where_its_own_compression_puts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that stores values column by column, and metadata behind them."""

    def in_columns(dense: Tensor) -> Tensor:
        kept = torch.stack([row[row != 0] for row in dense])
        values = kept.T.contiguous().view(-1)
        return torch.cat([values, torch.full((8,), 7, dtype=dense.dtype)]).view(1, -1)

    monkeypatch.setattr(product24, "require_backend", lambda *_: None)
    monkeypatch.setattr(torch, "_cslt_compress", in_columns)
    weight, mask = _weight(32, 64)
    made = compress(mask, torch.float16, "cusparselt")
    fill(made, weight)
    assert torch.equal(made.packed, in_columns(weight.half()))


def test_padding_and_the_order_of_operands_are_those_of_torchs_operators(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, ...]] = []

    def cslt(packed: Tensor, dense: Tensor, *, bias: Tensor, transpose_result: bool, alg_id: int) -> Tensor:
        seen.append(tuple(dense.shape))
        assert transpose_result
        assert alg_id == 3
        return (packed @ dense).T.contiguous() + bias

    monkeypatch.setattr(torch, "_cslt_sparse_mm", cslt)
    weight, _ = _weight(16, 32)
    x, bias = torch.randn(5, 32).half(), torch.randn(16).half()
    y = multiply(x, weight.half(), None, bias, shape=(16, 32), backend="cusparselt", algorithm=3)
    assert seen == [(32, 8)]
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight.half(), bias), rtol=1e-2, atol=1e-2)

    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", lambda packed, meta, dense: packed @ dense)
    y = multiply(x, weight.half(), torch.empty(0), None, shape=(16, 32), backend="cutlass")
    assert (y.shape, y.is_contiguous()) == ((5, 16), True)
    torch.testing.assert_close(y, x @ weight.half().T, rtol=1e-2, atol=1e-2)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 40), st.integers(0, 1000))
def test_integers_are_multiplied_exactly(n_rows: int, n_out: int, n_groups: int, seed: int) -> None:
    _, mask = _weight(n_out, 4 * n_groups, seed)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, mask.shape, generator=generator, dtype=torch.int8) * mask
    x = torch.randint(-127, 128, (n_rows, 4 * n_groups), generator=generator, dtype=torch.int8)
    made = compress(mask, torch.int8, "reference")
    fill(made, weight)
    found = multiply_integers(x, made.packed, made.meta, shape=made.shape, backend="reference")
    assert torch.equal(found.long(), x.long() @ weight.long().T)


@given(st.integers(0, 1000), st.floats(1e-20, 1e20))
def test_quantized_rows_are_off_by_half_a_step_at_most(seed: int, size: float) -> None:
    x = size * torch.randn((5, 9), generator=torch.Generator().manual_seed(seed))
    x[2] = 0.0
    integers, scale = quantized_rows(x)
    assert int(integers.abs().max()) == 127
    assert scale[2] == 1.0
    assert ((integers * scale[:, None] - x).abs() <= 0.5001 * scale[:, None]).all()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden_by_integers(wrong: float) -> None:
    _, mask = _weight(4, 8, 0)
    made = compress(mask, torch.int8, "reference")
    fill(made, mask.to(torch.int8))
    x = torch.ones(3, 8)
    x[1, 5] = wrong
    integers, scale = quantized_rows(x)
    y = multiply_integers(integers, made.packed, made.meta, shape=made.shape, backend="reference")
    assert (y.float() * scale[:, None]).isfinite().all(1).tolist() == [True, False, True]


def test_integer_products_ask_the_hardware_for_whole_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.dtype, tuple[int, ...]]] = []

    def mm(packed: Tensor, *rest: Tensor, out_dtype: torch.dtype, **_: object) -> Tensor:
        dense = rest[-1]
        seen.append((out_dtype, tuple(dense.shape)))
        return (packed.double() @ dense.double()).to(out_dtype)

    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", mm)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", lambda *a, **k: mm(*a, **k).T)
    x, weight = (torch.randint(-9, 9, shape, dtype=torch.int8) for shape in ((5, 64), (32, 64)))
    for backend in BACKENDS[1:]:
        y = multiply_integers(x, weight, torch.empty(0), shape=(32, 64), backend=backend)
        assert torch.equal(y.long(), x.long() @ weight.long().T)
    assert seen == [(torch.int32, (64, 16))] * 2


@pytest.mark.parametrize(
    ("shape", "dtype", "backend", "reason"),
    [
        ((32, 64), torch.float16, "cutlass", None),
        ((16, 64), torch.float16, "cutlass", "16 outputs, and cutlass wants a multiple of 32"),
        ((32, 48), torch.bfloat16, "cutlass", "48 inputs, and cutlass wants a multiple of 64"),
        ((16, 128), torch.int8, "cutlass", None),
        ((16, 16), torch.bfloat16, "cusparselt", None),
        ((16, 16), torch.int8, "cusparselt", "16 outputs, and cusparselt wants a multiple of 32"),
        ((64, 64), torch.float32, "cusparselt", "no 2:4 product for float32"),
        ((64, 64), torch.float32, "cutlass", "no 2:4 product for float32"),
        ((64, 64, 3, 3), torch.float16, "cutlass", "is no matrix"),
        ((0, 64), torch.float16, "cutlass", "is no matrix"),
        ((3, 8), torch.float32, "reference", None),
        ((3, 10), torch.float32, "reference", "4 does not divide"),
    ],
)
def test_limits_are_told_in_words(
    shape: tuple[int, ...], dtype: torch.dtype, backend: Backend, reason: str | None
) -> None:
    found = why_not(shape, dtype, backend)
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_rows_are_padded_to_what_each_backend_wants() -> None:
    assert row_multiple(torch.float16, "cusparselt") == 8
    assert row_multiple(torch.int8, "cutlass") == 16
    assert row_multiple(torch.float32, "reference") == 1


def test_masks_and_devices_that_cannot_be_are_refused() -> None:
    _, mask = _weight(16, 16)
    with pytest.raises(UsageError, match="along its inputs"):
        compress(torch.ones_like(mask), torch.float32, "reference")
    with pytest.raises(UsageError, match="along its outputs"):
        compress(
            torch.tensor([[1, 1, 0, 0]] * 4, dtype=torch.bool), torch.float32, "reference", transposed=True
        )
    with pytest.raises(UsageError, match="4 does not divide"):
        compress(mask[:, :6], torch.float32, "reference")
    for backend in ("cutlass", "cusparselt"):
        with pytest.raises(MissingCapability, match="on cpu"):
            compress(mask, torch.float16, backend)
    with pytest.raises(UsageError, match="'cuda'"):
        compress(mask, torch.float16, "cuda")  # type: ignore[arg-type]


def test_only_cusparselt_has_algorithms_to_choose_from() -> None:
    found = best_algorithms([((16, 16), 8)], torch.float32, "reference", torch.device("cpu"))
    assert found == [DEFAULT]


def _only_where_it_is(backend: Backend) -> None:
    """torch has CUTLASS's products for compute capability 8.x alone."""
    if backend == "cutlass" and torch.cuda.get_device_capability()[0] != 8:
        with pytest.raises(MissingCapability, match=r"8\.x"):
            require_backend(backend, torch.device("cuda"))
        pytest.skip("torch has no such product by CUTLASS for this card, and says so")


@pytest.mark.gpu
@pytest.mark.parametrize("n_rows", [1, 8, 197, 4096])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cutlass", "cusparselt"])
def test_the_hardware_agrees_with_float64(backend: Backend, dtype: torch.dtype, n_rows: int) -> None:
    _only_where_it_is(backend)
    scores = torch.randn(256, 512)
    mask = transposable_mask(scores)
    weight = (scores * mask).to("cuda", dtype)
    x, gy = (torch.randn(n_rows, n, device="cuda", dtype=dtype) for n in (512, 256))
    for transposed, rows, wanted in (
        (False, x, x.double() @ weight.double().T),
        (True, gy, gy.double() @ weight.double()),
    ):
        made = compress(mask.cuda(), dtype, backend, transposed=transposed)
        for factor in (1.0, -2.0):
            fill(made, factor * weight)
            found = _times(rows, made)
            tolerance = 2 * torch.finfo(dtype).eps * float(wanted.abs().max()) * abs(factor)
            torch.testing.assert_close(found.double(), factor * wanted, rtol=0, atol=tolerance)


@pytest.mark.gpu
def test_the_algorithm_found_fastest_agrees_with_float64_and_one_plan_takes_every_bias() -> None:
    weight, mask = _weight(256, 512)
    made = compress(mask.cuda(), torch.bfloat16, "cusparselt")
    fill(made, weight.cuda())
    x = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16)
    (algorithm,) = best_algorithms([(made.shape, 64)], torch.bfloat16, "cusparselt", x.device)
    assert algorithm != DEFAULT or not cusparselt.is_there()
    for bias in torch.randn(3, 256, device="cuda", dtype=torch.bfloat16).mul(20).unbind():
        found = multiply(
            x, made.packed, made.meta, bias, shape=made.shape, backend="cusparselt", algorithm=algorithm
        )
        wanted = x.double() @ weight.cuda().bfloat16().double().T + bias.double()
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2**-7 * float(wanted.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cutlass", "cusparselt"])
def test_the_hardware_multiplies_integers_exactly(backend: Backend) -> None:
    _only_where_it_is(backend)
    _, mask = _weight(256, 512)
    weight = (torch.randint(-127, 128, mask.shape, dtype=torch.int8) * mask).cuda()
    x = torch.randint(-127, 128, (197, 512), dtype=torch.int8, device="cuda")
    made = compress(mask.cuda(), torch.int8, backend)
    fill(made, weight)
    found = multiply_integers(x, made.packed, made.meta, shape=made.shape, backend=backend)
    assert torch.equal(found.double(), x.double() @ weight.double().T)
