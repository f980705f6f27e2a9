"""2:4 matrices as kept values and their places: places are found once for a mask, values are gathered again.

Legend: O outputs, I inputs of a layer, the reduction axis; K = I / 2 kept values of a row.
A mask of fewer than two in a group is completed: every group stores two values, and those in the places that
were added are the weight's own, which has to be zero there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sparse_export.errors import SparseExportError
from sparse_export.sparsity.pattern import NMPattern, groups_over

__all__ = ["TWO_FOUR", "expanded", "gather", "kept_columns", "learned_places", "places"]

TWO_FOUR = NMPattern(n=2, m=4)

# Which two of a group are stored, by its mask (bit i: member i is kept). Groups with fewer than two are
# completed as CUTLASS's packing does it, so that all ways to a compressed matrix give the same one.
_FIRST = (2, 0, 1, 0, 2, 0, 1, 0, 2, 0, 1, 0, 2, 0, 0, 0)
_SECOND = (3, 2, 2, 1, 3, 2, 2, 0, 3, 3, 3, 0, 3, 0, 0, 0)
# The largest whole number below which a type holds all of them.
_EXACT = {
    torch.int8: 127,
    torch.bfloat16: 256,
    torch.float16: 2048,
    torch.float32: 2**24,
}


def kept_columns(mask_OI: Tensor) -> Tensor:
    """Columns of the values that each row stores: int64 (O, K), two a group, ascending.

    mask_OI: bool, at most two of every four along I. Raises ValueError for another one.
    """
    n_over = int(groups_over(mask_OI, 1, TWO_FOUR))
    if n_over:
        raise ValueError(f"{n_over} groups of the mask have more than 2 of 4.")
    groups_OG4 = mask_OI.reshape(mask_OI.shape[0], -1, 4)
    bits = torch.tensor([1, 2, 4, 8], device=mask_OI.device)
    code_OG = (groups_OG4 * bits).sum(2)
    members = torch.tensor([_FIRST, _SECOND], device=mask_OI.device)
    pairs_OG2 = torch.stack([members[0][code_OG], members[1][code_OG]], dim=2)
    first = 4 * torch.arange(groups_OG4.shape[1], device=mask_OI.device)
    return (pairs_OG2 + first[None, :, None]).flatten(1)


def places(columns_OK: Tensor, n_inputs: int) -> Tensor:
    """Places of kept values in the flat dense matrix, row after row: int64 (O * K,)."""
    rows = torch.arange(columns_OK.shape[0], device=columns_OK.device)[:, None]
    return (rows * n_inputs + columns_OK).flatten()


def gather(values: Tensor, weight: Tensor, places: Tensor) -> None:
    """Overwrite kept values with those of a weight.

    values: (n,), of the type to compute in.  weight: contiguous, of any type.  places: int64 (n,), in its
    flat memory. Makes no host synchronisation.
    """
    values.copy_(weight.detach().reshape(-1).index_select(0, places))


def expanded(values_OK: Tensor, columns_OK: Tensor, n_inputs: int) -> Tensor:
    """The dense matrix (O, I) of kept values."""
    dense = torch.zeros((values_OK.shape[0], n_inputs), dtype=values_OK.dtype, device=values_OK.device)
    return dense.scatter_(1, columns_OK, values_OK)


def learned_places(compress: Callable[[Tensor], Tensor], mask_OI: Tensor, dtype: torch.dtype) -> Tensor:
    """Places of the values that `compress` stores, in its own order, whatever that is: int64 (O * K,).

    compress: gives the kept values of a dense matrix (O, I), flat.
    Matrices are compressed whose entries are the digits of their own places, so nothing has to be known about
    the layout. Raises SparseExportError when what comes back is not every kept place once.
    """
    columns_OK = kept_columns(mask_OI)
    full_OI = torch.zeros_like(mask_OI).scatter_(1, columns_OK, True)
    place_OI = torch.arange(mask_OI.numel(), device=mask_OI.device).view(mask_OI.shape)
    base = _EXACT[dtype] - 1
    n_digits = max(1, math.ceil(math.log(mask_OI.numel(), base)))
    found = torch.zeros(columns_OK.numel(), dtype=torch.int64, device=mask_OI.device)
    for digit in range(n_digits + 1):  # one more, in case the logarithm was rounded down
        # One is added, since a zero would not be kept.
        digits_OI = torch.where(full_OI, place_OI // base**digit % base + 1, 0)
        found += (compress(digits_OI.to(dtype)).to(torch.int64) - 1) * base**digit
    wanted = places(columns_OK, mask_OI.shape[1])
    if not torch.equal(found.sort().values, wanted.sort().values):
        raise SparseExportError(
            f"A compressed matrix of shape {tuple(mask_OI.shape)} does not hold its values in a known way.",
            expected="Every kept value was expected once, before the metadata.",
            do="Report the versions of torch and of the card; compute with another backend meanwhile.",
        )
    return found
