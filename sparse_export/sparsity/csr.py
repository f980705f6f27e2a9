"""Products by a sparse matrix on the CPU: its active entries in rows (CSR), and those of its transpose.

Legend: O outputs, I inputs, N rows of activations, K active weights.
Activations are handed over with features first, (I, N) and (O, N): torch's CSR product takes them so.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CsrForm", "csr_form", "gather", "gradient_at", "multiply", "multiply_transposed", "scatter"]


@dataclass(frozen=True, kw_only=True)
class CsrForm:
    """Where a matrix (O, I) has its active entries, in the order of rows; values go along separately, shape
    (K,).

    places: int32, positions in the flattened matrix, ascending.
    crow, col: int32, of the matrix, shapes (O + 1,) and (K,).  crow_t, col_t: of its transpose, (I + 1,) and
    (K,).  to_transposed: int32, shape (K,): the transpose's values are values[to_transposed].
    """

    shape: tuple[int, int]
    places: Tensor
    crow: Tensor
    col: Tensor
    crow_t: Tensor
    col_t: Tensor
    to_transposed: Tensor

    @property
    def n_active(self) -> int:
        return self.places.numel()


def csr_form(mask_OI: Tensor) -> CsrForm:
    """The form of a mask: bool, shape (O, I), on the CPU.

    Raises ValueError for a mask that is no matrix, lies elsewhere, or has more entries than 32 bits can
    count: the library behind torch's products takes 32-bit indices, and torch would convert others at every
    product.
    """
    if mask_OI.ndim != 2 or mask_OI.dtype != torch.bool or mask_OI.device.type != "cpu":
        raise ValueError(
            f"The mask is {mask_OI.dtype} of shape {tuple(mask_OI.shape)} on {mask_OI.device}; a bool matrix "
            "on the CPU "
            "was expected."
        )
    if mask_OI.numel() >= 2**31:
        raise ValueError(f"The mask has {mask_OI.numel()} entries; fewer than 2**31 were expected.")
    n_out, n_in = mask_OI.shape
    places = mask_OI.flatten().nonzero().squeeze(1)
    row, col = places // n_in, places % n_in
    to_transposed = torch.argsort(col, stable=True)  # rows ascend already
    return CsrForm(
        shape=(n_out, n_in),
        places=places.int(),
        crow=_starts(row, n_out),
        col=col.int(),
        crow_t=_starts(col, n_in),
        col_t=row[to_transposed].int(),
        to_transposed=to_transposed.int(),
    )


def _starts(row: Tensor, n_rows: int) -> Tensor:
    """Where each row begins among the active entries, and where the last one ends."""
    starts = torch.zeros(n_rows + 1, dtype=torch.int32)
    starts[1:] = torch.bincount(row, minlength=n_rows).cumsum(0)
    return starts


def gather(form: CsrForm, dense: Tensor) -> Tensor:
    """The active entries of a matrix of the form's shape; shape (K,)."""
    return dense.reshape(-1).index_select(0, form.places)


def scatter(form: CsrForm, values: Tensor, dense: Tensor) -> None:
    """Put active entries into a contiguous matrix of the form's shape, in place; the others stay."""
    dense.view(-1).index_copy_(0, form.places.long(), values)


def multiply(form: CsrForm, values: Tensor, x_IN: Tensor) -> Tensor:
    """W x, of shape (O, N)."""
    return _matrix(form.crow, form.col, values, form.shape) @ x_IN


def multiply_transposed(form: CsrForm, values: Tensor, gy_ON: Tensor) -> Tensor:
    """Wᵀ gy, of shape (I, N)."""
    turned = values.index_select(0, form.to_transposed)
    return _matrix(form.crow_t, form.col_t, turned, form.shape[::-1]) @ gy_ON


def gradient_at(form: CsrForm, gy_ON: Tensor, x_IN: Tensor) -> Tensor:
    """gy xᵀ at the active positions alone, shape (K,)."""
    if form.n_active == 0:
        return gy_ON.new_zeros(0)
    pattern = _matrix(form.crow, form.col, gy_ON.new_zeros(form.n_active), form.shape)
    sampled: Tensor = torch.sparse.sampled_addmm(pattern, gy_ON, x_IN.t(), beta=0.0)
    return sampled.values()


def _matrix(crow: Tensor, col: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    _announce()
    return torch.sparse_csr_tensor(crow, col, values, size=shape, check_invariants=False)


@functools.cache
def _announce() -> None:
    """Make torch's first CSR matrix of the process, which it warns of, once, as a beta feature."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Sparse CSR tensor support is in beta", category=UserWarning
        )
        torch.sparse_csr_tensor(
            torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([1.0]), size=(1, 1), check_invariants=False
        )
