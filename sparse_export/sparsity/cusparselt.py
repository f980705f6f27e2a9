"""cuSPARSELt's 2:4 product with plans that are kept.

torch's own operator makes a plan at every call. On an H100 with cuSPARSELt 0.8.0 that kept the host busy for
0.39 ms a product in bfloat16, and for 176 ms in float16, whose kernels are compiled while the plan is made:
longer than the products themselves take. Here a plan is made once for a size and type. It stays for as long
as the process does, since a captured CUDA graph goes on to use its kernels; a program whose number of rows
never repeats makes a plan each time.

The library is the one that torch loaded. Calls are as its header, cusparseLt.h of 0.8, declares them.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import cache
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from sparse_export.errors import MissingCapability

__all__ = ["is_there", "n_algorithms", "product", "version"]

_LIBRARY = "libcusparseLt.so.0"
_OPAQUE_BYTES = 16384  # 512 from 0.7 on, 11,024 before
_ROW_MAJOR, _COLUMN_MAJOR = 2, 1
_AS_IT_IS, _TRANSPOSED = 0, 1
_HALF_OF_FOUR = 0
_TYPES = {torch.float16: 2, torch.bfloat16: 14, torch.int8: 3, torch.int32: 10}  # cudaDataType
_IN_INT32, _IN_FLOAT32 = 0, 2  # cusparseComputeType
_BIAS_POINTER = 8  # cusparseLtMatmulDescAttribute_t
_CONFIG_ID, _CONFIG_MAX_ID = 0, 1  # cusparseLtMatmulAlgAttribute_t
_ALIGNMENT = 16


class _Opaque:
    """Memory of one of the library's own structures."""

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(_OPAQUE_BYTES + 64)
        self.address = ctypes.c_void_p((ctypes.addressof(self._memory) + 63) // 64 * 64)


@cache
def _library() -> Any:
    """The library that torch has loaded, or None."""
    if not torch.backends.cusparselt.is_available():
        return None
    try:
        return ctypes.CDLL(_LIBRARY)
    except OSError:
        return None


def is_there() -> bool:
    """Can products be made here?"""
    return _library() is not None


def version() -> str:
    """Of the library, as in 0.8.0. Raises MissingCapability where there is none."""
    _require()
    number = int(torch._C._cusparselt.getVersionInt())
    return f"{number // 1000}.{number % 1000 // 100}.{number % 100}"


def _require() -> Any:
    library = _library()
    if library is None:
        raise MissingCapability(
            f"{_LIBRARY} is not loaded.",
            expected="A torch that brings it along was expected, on a machine with a card.",
            do="Install a torch for CUDA, or leave the layers dense.",
        )
    return library


def _call(function: str, *arguments: Any) -> None:
    """Call the library. Raises RuntimeError, as torch's operators do, for any status but success."""
    library = _require()
    status = getattr(library, function)(*arguments)
    if status:
        library.cusparseLtGetErrorString.restype = ctypes.c_char_p
        said = library.cusparseLtGetErrorString(status) or b"no reason given"
        raise RuntimeError(f"{function} failed with status {status}: {said.decode()}.")


@cache
def _handle(device: int) -> _Opaque:
    handle = _Opaque()
    with torch.cuda.device(device):
        _call("cusparseLtInit", handle.address)
    return handle


@dataclass(frozen=True, kw_only=True)
class _Size:
    """What a plan is made for: y (N, O) = x (N, I) Wᵀ with W (O, I) compressed, by one algorithm, or by the
    default.
    """

    device: int
    dtype: torch.dtype
    n_outputs: int
    n_inputs: int
    n_rows: int
    has_bias: bool
    algorithm: int


class _Plan:
    """One plan, with everything that it points to."""

    def __init__(self, size: _Size, bias: Tensor | None) -> None:
        self._handle = _handle(size.device)
        self._kept = [_Opaque() for _ in range(6)]
        sparse, dense, out, self._product, algorithm, self._plan = self._kept
        value_type, out_type, compute = _types(size.dtype)
        n_out, n_in, n_rows = (ctypes.c_int64(n) for n in (size.n_outputs, size.n_inputs, size.n_rows))
        handle = self._handle.address
        _call(
            "cusparseLtStructuredDescriptorInit",
            handle,
            sparse.address,
            n_out,
            n_in,
            n_in,
            _ALIGNMENT,
            value_type,
            _ROW_MAJOR,
            _HALF_OF_FOUR,
        )
        _call(
            "cusparseLtDenseDescriptorInit",
            handle,
            dense.address,
            n_rows,
            n_in,
            n_in,
            _ALIGNMENT,
            value_type,
            _ROW_MAJOR,
        )
        # Columns of the result (O, N) lie one after another, which makes it y (N, O) row after row.
        _call(
            "cusparseLtDenseDescriptorInit",
            handle,
            out.address,
            n_out,
            n_rows,
            n_out,
            _ALIGNMENT,
            out_type,
            _COLUMN_MAJOR,
        )
        _call(
            "cusparseLtMatmulDescriptorInit",
            handle,
            self._product.address,
            _AS_IT_IS,
            _TRANSPOSED,
            sparse.address,
            dense.address,
            out.address,
            out.address,
            compute,
        )
        self._bias = 0
        if bias is not None:
            self._set_bias(bias)
        _call("cusparseLtMatmulAlgSelectionInit", handle, algorithm.address, self._product.address, 0)
        if size.algorithm >= 0:
            chosen = ctypes.c_int(size.algorithm)
            _call(
                "cusparseLtMatmulAlgSetAttribute",
                handle,
                algorithm.address,
                _CONFIG_ID,
                ctypes.byref(chosen),
                ctypes.c_size_t(4),
            )
        most = ctypes.c_int(0)
        _call(
            "cusparseLtMatmulAlgGetAttribute",
            handle,
            algorithm.address,
            _CONFIG_MAX_ID,
            ctypes.byref(most),
            ctypes.c_size_t(4),
        )
        self.n_algorithms = most.value
        _call(
            "cusparseLtMatmulPlanInit", handle, self._plan.address, self._product.address, algorithm.address
        )
        n_bytes = ctypes.c_size_t(0)
        _call("cusparseLtMatmulGetWorkspace", handle, self._plan.address, ctypes.byref(n_bytes))
        self.workspace_bytes = n_bytes.value
        self._one, self._zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        self._run = _require().cusparseLtMatmul

    def _set_bias(self, bias: Tensor) -> None:
        self._bias = bias.data_ptr()
        pointer = ctypes.c_void_p(self._bias)
        _call(
            "cusparseLtMatmulDescSetAttribute",
            self._handle.address,
            self._product.address,
            _BIAS_POINTER,
            ctypes.byref(pointer),
            ctypes.c_size_t(8),
        )

    def __call__(self, packed: Tensor, x: Tensor, bias: Tensor | None, out: Tensor, stream: int) -> None:
        """Launch. The bias is read from where it lies now."""
        if bias is not None and bias.data_ptr() != self._bias:
            self._set_bias(bias)
        workspace = (
            torch.empty(self.workspace_bytes, dtype=torch.uint8, device=x.device)
            if self.workspace_bytes
            else None
        )
        queue = ctypes.c_void_p(stream)
        status = self._run(
            self._handle.address,
            self._plan.address,
            ctypes.byref(self._one),
            ctypes.c_void_p(packed.data_ptr()),
            ctypes.c_void_p(x.data_ptr()),
            ctypes.byref(self._zero),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_void_p(workspace.data_ptr() if workspace is not None else 0),
            ctypes.byref(queue),
            1,
        )
        if status:
            raise RuntimeError(f"cusparseLtMatmul failed with status {status}.")


def _types(dtype: torch.dtype) -> tuple[int, int, int]:
    """Of values, results and sums."""
    if dtype == torch.int8:
        return _TYPES[dtype], _TYPES[torch.int32], _IN_INT32
    return _TYPES[dtype], _TYPES[dtype], _IN_FLOAT32


_plans: dict[_Size, _Plan] = {}
_lock = RLock()  # the place of the bias and the launch belong together


def _plan(size: _Size, bias: Tensor | None) -> _Plan:
    """By the library's own choice where the algorithm is refused for this size: it was found for another."""
    found = _plans.get(size)
    if found is None:
        try:
            found = _Plan(size, bias)
        except RuntimeError:
            if size.algorithm < 0:
                raise
            found = _plan(replace(size, algorithm=-1), bias)
        _plans[size] = found
    return found


def n_algorithms(n_outputs: int, n_inputs: int, n_rows: int, dtype: torch.dtype, *, has_bias: bool) -> int:
    """How many there are to choose from for a product on the current device.

    Raises RuntimeError, MissingCapability.
    """
    device = torch.cuda.current_device()
    bias = torch.zeros(n_outputs, dtype=dtype, device=f"cuda:{device}") if has_bias else None
    size = _Size(
        device=device,
        dtype=dtype,
        n_outputs=n_outputs,
        n_inputs=n_inputs,
        n_rows=n_rows,
        has_bias=has_bias,
        algorithm=-1,
    )
    with _lock, torch.cuda.device(device):
        return _plan(size, bias).n_algorithms


def product(x_NI: Tensor, packed: Tensor, bias: Tensor | None, n_outputs: int, algorithm: int = -1) -> Tensor:
    """x Wᵀ + bias, (N, O), by a matrix that `torch._cslt_compress` gave. Can be traced by torch.compile.

    x_NI: contiguous, on a card; float16 or bfloat16, or int8, which gives int32 and takes no bias. N has to
    be a multiple of what the library wants.  algorithm: below `n_algorithms`; -1 is the library's own choice.
    Raises RuntimeError with the library's status, MissingCapability.
    """
    result: Tensor = torch.ops.sparse_export.product24(x_NI, packed, bias, n_outputs, algorithm)
    return result


def _launch(x: Tensor, packed: Tensor, bias: Tensor | None, n_outputs: int, algorithm: int) -> Tensor:
    _check(x, packed, bias, n_outputs)
    n_rows, n_inputs = x.shape
    out = x.new_empty((n_rows, n_outputs), dtype=torch.int32 if x.dtype == torch.int8 else x.dtype)
    device = x.device.index
    size = _Size(
        device=device,
        dtype=x.dtype,
        n_outputs=n_outputs,
        n_inputs=n_inputs,
        n_rows=n_rows,
        has_bias=bias is not None,
        algorithm=algorithm,
    )
    with _lock, torch.cuda.device(device):
        _plan(size, bias)(packed, x, bias, out, torch.cuda.current_stream(device).cuda_stream)
    return out


def _check(x: Tensor, packed: Tensor, bias: Tensor | None, n_outputs: int) -> None:
    """Raise ValueError for what native code must not be given."""
    fits = (
        x.ndim == 2
        and x.is_contiguous()
        and x.dtype in (torch.float16, torch.bfloat16, torch.int8)
        and packed.is_contiguous()
        and packed.dtype == x.dtype
        and packed.device == x.device
        and packed.numel() >= n_outputs * x.shape[1] // 2
    )
    if bias is not None:
        wanted = (n_outputs,), x.dtype, x.device
        fits = fits and bias.is_contiguous() and x.dtype != torch.int8
        fits = fits and (tuple(bias.shape), bias.dtype, bias.device) == wanted
    if not fits:
        raise ValueError(
            f"Rows {tuple(x.shape)} of {x.dtype}, a compressed matrix of {packed.numel()} entries of "
            f"{packed.dtype} and "
            f"{'no bias' if bias is None else f'a bias {tuple(bias.shape)} of {bias.dtype}'} do not make "
            f"{n_outputs} "
            "outputs: contiguous ones of one type on one device were expected, without a bias for int8."
        )


def _shape_only(x: Tensor, packed: Tensor, bias: Tensor | None, n_outputs: int, algorithm: int) -> Tensor:
    return x.new_empty((x.shape[0], n_outputs), dtype=torch.int32 if x.dtype == torch.int8 else x.dtype)


_operators = torch.library.Library("sparse_export", "DEF")
_operators.define("product24(Tensor x, Tensor packed, Tensor? bias, int n_outputs, int algorithm) -> Tensor")
_operators.impl("product24", _launch, "CUDA")
torch.library.register_fake("sparse_export::product24", _shape_only, lib=_operators)
