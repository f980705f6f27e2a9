"""Products with a 2:4 matrix: on the hardware through torch's operators, and dense for reference.

Tried on an H100, with cuSPARSELt (docs/benchmarks.md). Everything around the operators, limits, padding,
packing and places, is the same for the reference and is tested with it.

Legend: N rows of activations, O outputs, I inputs of a layer, the reduction axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from sparse_export.errors import MissingCapability, UsageError
from sparse_export.sparsity import cusparselt
from sparse_export.sparsity.compressed import (
    TWO_FOUR,
    expanded,
    gather,
    kept_columns,
    learned_places,
    places,
)

__all__ = [
    "BACKENDS",
    "DEFAULT",
    "Backend",
    "Compressed",
    "compress",
    "fill",
    "multiply",
    "multiply_integers",
    "quantized_rows",
    "require_backend",
    "row_multiple",
    "values_of",
    "why_not",
]

DEFAULT = -1
"""The algorithm that is cuSPARSELt's own choice."""

# Whether cuSPARSELt's plans are ours to keep; found out when a matrix is first compressed for it.
_OWN_PLANS = False

Backend = Literal["reference", "cutlass", "cusparselt"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


@dataclass(frozen=True, kw_only=True)
class _Limit:
    """Multiples that a product wants of O, I and N."""

    outputs: int
    inputs: int
    rows: int


# From torch 2.14.1, torch/sparse/semi_structured.py, _DTYPE_SHAPE_CONSTRAINTS. float32 is 1:2 there, not 2:4.
_HALF = (torch.float16, torch.bfloat16)
_LIMITS: dict[Backend, dict[torch.dtype, _Limit]] = {
    "cutlass": {
        **dict.fromkeys(_HALF, _Limit(outputs=32, inputs=64, rows=8)),
        torch.int8: _Limit(outputs=16, inputs=128, rows=16),
    },
    "cusparselt": {
        **dict.fromkeys(_HALF, _Limit(outputs=16, inputs=16, rows=8)),
        torch.int8: _Limit(outputs=32, inputs=32, rows=16),
    },
}


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """A 2:4 matrix (O, I), filled with the values of a dense weight by `fill`.

    packed: kept values, and for cuSPARSELt its metadata behind them.  meta: columns for the reference,
    CUTLASS's metadata, None for cuSPARSELt.  places: int32 or int64, where in the weight's flat memory each
    kept value comes from; for a transposed matrix that is the memory of the weight that it is the transpose
    of.
    """

    backend: Backend
    shape: tuple[int, int]
    packed: Tensor
    meta: Tensor | None
    places: Tensor


def why_not(shape: tuple[int, ...], dtype: torch.dtype, backend: Backend) -> str | None:
    """Why a weight of this shape cannot be multiplied sparsely; None when it can.

    The reference takes any type.
    """
    if len(shape) != 2 or 0 in shape:
        return f"its shape {shape} is no matrix"
    if backend == "reference":
        multiple = TWO_FOUR.m
        return None if shape[1] % multiple == 0 else f"it has {shape[1]} inputs, and 4 does not divide them"
    limit = _LIMITS[backend].get(dtype)
    if limit is None:
        return f"{backend} has no 2:4 product for {str(dtype).removeprefix('torch.')}"
    for what, size, multiple in (("outputs", shape[0], limit.outputs), ("inputs", shape[1], limit.inputs)):
        if size % multiple:
            return f"it has {size} {what}, and {backend} wants a multiple of {multiple}"
    return None


def row_multiple(dtype: torch.dtype, backend: Backend) -> int:
    """Activations are padded with zeros to this multiple of rows, which is why small batches lose."""
    return 1 if backend == "reference" else _LIMITS[backend][dtype].rows


def require_backend(backend: Backend, device: torch.device) -> None:
    """Raise UsageError for an unknown backend, MissingCapability where this device has no such product."""
    if backend not in BACKENDS:
        raise UsageError(
            f"The 2:4 backend is {backend!r}.", expected=f"One of {', '.join(BACKENDS)} was expected."
        )
    if backend != "reference" and device.type != "cuda":
        raise MissingCapability(
            f"A 2:4 product by {backend} was asked for on {device.type}.",
            expected="A CUDA device was expected: sparse matrix instructions are the GPU's.",
            do="Use a machine with an NVIDIA card of compute capability 8.0 or newer.",
        )
    if backend == "cutlass" and torch.cuda.get_device_capability(device)[0] != 8:
        raise MissingCapability(
            f"A 2:4 product by cutlass was asked for on {torch.cuda.get_device_name(device)}.",
            expected="A card of compute capability 8.x was expected: torch has these products for no other.",
            do="Use the backend cusparselt.",
        )
    if backend == "cusparselt" and not torch.backends.cusparselt.is_available():
        raise MissingCapability(
            f"torch {torch.__version__} has no cuSPARSELt here.",
            expected="One was expected for this backend.",
            do="Install a torch built with it, or use the backend cutlass.",
        )
    if backend == "cusparselt":
        global _OWN_PLANS
        _OWN_PLANS = cusparselt.is_there()


def compress(
    mask_OI: Tensor, dtype: torch.dtype, backend: Backend, *, transposed: bool = False
) -> Compressed:
    """Prepare a 2:4 matrix for a mask: once for as long as the mask stands. Its values are zeros until
    `fill`.

    mask_OI: bool, on the device to compute on, 2:4 along I.  transposed: make the matrix (I, O) of the
    transposed weight, for which the mask has to be 2:4 along O. Raises UsageError when the mask does not obey
    or `why_not` has a reason; MissingCapability.
    """
    require_backend(backend, mask_OI.device)
    mask = mask_OI.T.contiguous() if transposed else mask_OI
    shape = (mask.shape[0], mask.shape[1])
    reason = why_not(shape, dtype, backend)
    if reason is not None:
        raise UsageError(
            f"A weight of shape {tuple(mask_OI.shape)} cannot be multiplied as 2:4"
            f"{', transposed' if transposed else ''}: {reason}.",
            do="Leave this layer dense.",
        )
    try:
        columns = kept_columns(mask)
    except ValueError as cause:
        raise UsageError(
            f"A mask of shape {tuple(mask_OI.shape)} is not 2:4 along its "
            f"{'outputs' if transposed else 'inputs'}: "
            f"{cause}",
            expected="At most two of every four were expected.",
            do="Train with the pattern 2:4, or choose a transposable mask.",
        ) from cause
    ones = torch.zeros(shape, dtype=dtype, device=mask.device).scatter_(1, columns, 1)
    meta: Tensor | None
    if backend == "reference":
        packed, meta = torch.zeros(columns.shape, dtype=dtype, device=mask.device), columns
        found = places(columns, shape[1])
    elif backend == "cutlass":
        packed, meta = sparse_semi_structured_from_dense_cutlass(ones)
        found = places(columns, shape[1])
    else:
        packed, meta = torch._cslt_compress(ones), None
        n_kept = columns.numel()
        found = learned_places(lambda dense: torch._cslt_compress(dense).reshape(-1)[:n_kept], mask, dtype)
    if transposed:
        found = found % shape[1] * shape[0] + found // shape[1]
    if mask.numel() < 2**31:
        found = found.to(torch.int32)  # read at every step, so half the bytes count
    compressed = Compressed(backend=backend, shape=shape, packed=packed, meta=meta, places=found)
    values_of(compressed).zero_()
    return compressed


def values_of(compressed: Compressed) -> Tensor:
    """The kept values, flat, as they lie in `packed`."""
    return compressed.packed.view(-1)[: math.prod(compressed.shape) // 2]


def fill(compressed: Compressed, weight: Tensor) -> None:
    """Gather the values of a dense weight, zero where its mask is, into the compressed matrix, in place.

    weight: (O, I), or what reshapes to it, contiguous; of any float type. Makes no host synchronisation.
    """
    gather(values_of(compressed), weight, compressed.places)


def multiply(
    x_NI: Tensor,
    packed: Tensor,
    meta: Tensor | None,
    bias: Tensor | None,
    *,
    shape: tuple[int, int],
    backend: Backend,
    algorithm: int = DEFAULT,
) -> Tensor:
    """x Wᵀ + bias, (N, O), for the 2:4 matrix W (O, I) of a `Compressed`. Can be traced by torch.compile.

    x_NI, bias: of the matrix's type; N is padded as the backend wants it.  algorithm: of cuSPARSELt, see
    `sparse_export.models.search24`.
    """
    if backend == "reference":
        assert meta is not None
        return torch.nn.functional.linear(x_NI, expanded(packed, meta, shape[1]), bias)
    n_rows = x_NI.shape[0]
    n_pad = -n_rows % row_multiple(x_NI.dtype, backend)
    x = torch.nn.functional.pad(x_NI, (0, 0, 0, n_pad)) if n_pad else x_NI.contiguous()
    if backend == "cusparselt":
        if _OWN_PLANS:
            y = cusparselt.product(x, packed, bias, shape[0], algorithm)
        else:
            y = torch._cslt_sparse_mm(
                packed, x.t(), bias=bias, transpose_result=True, alg_id=max(0, algorithm)
            )
    elif bias is None:
        assert meta is not None
        y = torch._sparse_semi_structured_mm(packed, meta, x.t()).t()
    else:
        assert meta is not None
        y = torch._sparse_semi_structured_addmm(bias, packed, meta, x.t()).t()
    return y[:n_rows].contiguous() if n_pad or backend == "cutlass" else y


def quantized_rows(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as int8 times a scale of its own: int8 (N, I), symmetric, and float32 (N,).

    The scale is the row's largest magnitude / 127; a row of zeros has scale 1. Halves are rounded to even. Of
    a row that holds NaN or infinity the scale is that, so that products by it are not finite either.
    """
    x = x_NI.float()
    largest = x.abs().amax(1) if x.shape[1] else x.new_zeros(x.shape[0])
    scale = torch.where(largest == 0, 1.0, largest / 127)
    return (x / scale[:, None]).round().to(torch.int8), scale


def multiply_integers(
    x_NI: Tensor,
    packed: Tensor,
    meta: Tensor | None,
    *,
    shape: tuple[int, int],
    backend: Backend,
    algorithm: int = DEFAULT,
) -> Tensor:
    """x Wᵀ, int32 (N, O), of int8 activations and an int8 `Compressed`; exact. The rest as in `multiply`."""
    if backend == "reference":
        assert meta is not None
        dense = expanded(packed, meta, shape[1])
        return (x_NI.double() @ dense.double().T).to(torch.int32)
    n_rows = x_NI.shape[0]
    n_pad = -n_rows % row_multiple(torch.int8, backend)
    x = torch.nn.functional.pad(x_NI, (0, 0, 0, n_pad)) if n_pad else x_NI.contiguous()
    if backend == "cusparselt":
        if _OWN_PLANS:
            y = cusparselt.product(x, packed, None, shape[0], algorithm)
        else:
            y = torch._cslt_sparse_mm(
                packed, x.t(), transpose_result=True, out_dtype=torch.int32, alg_id=max(0, algorithm)
            )
    else:
        assert meta is not None
        y = torch._sparse_semi_structured_mm(packed, meta, x.t(), out_dtype=torch.int32).t()
    return y[:n_rows]
