"""The inputs and outputs of a network as Triton's protocol has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparse_export.signature import Array, Signature, TensorInfo, numpy_dtype

__all__ = ["Interface", "TensorSpec", "interface_of", "wire_dtype"]

_NAMES = {
    "float64": "FP64",
    "float32": "FP32",
    "float16": "FP16",
    "bfloat16": "BF16",
    "bool": "BOOL",
    **{f"{sign}int{bits}": f"{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}
_DTYPES = {triton: own for own, triton in _NAMES.items()}


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """An input or output of a model.

    Attributes:
        name: name of the tensor.
        dtype: Triton's name of its type, as `FP32`.
        dims: its sizes, -1 for one that is free; of a model whose requests are merged without the batch.
        is_scalar: the network has no size there. Triton wants one, so clients send an axis of 1 more.
    """

    name: str
    dtype: str
    dims: tuple[int, ...]
    is_scalar: bool = False

    def to_wire(self, array: Array) -> Array:
        """The array as clients send and get it."""
        return array[..., np.newaxis] if self.is_scalar else array

    def from_wire(self, array: Array) -> Array:
        """The array as the network takes and gives it."""
        return array[..., 0] if self.is_scalar else array


@dataclass(frozen=True, kw_only=True)
class Interface:
    """What a model takes and gives.

    Attributes:
        inputs: in the network's order.
        outputs: likewise.
        batched: samples lie along the first axis of every tensor and along no other, so that the server may
            merge requests of one size. Else each request is an execution.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batched: bool

    @property
    def bare_scalars(self) -> tuple[str, ...]:
        """Tensors without any size. Triton reshapes none of a model whose requests are not merged (2.51)."""
        ends = (*self.inputs, *self.outputs)
        return () if self.batched else tuple(one.name for one in ends if one.is_scalar)

    def __str__(self) -> str:
        texts = [
            ", ".join(f"{one.name} {one.dtype} {list(one.dims)}" for one in ends)
            for ends in (self.inputs, self.outputs)
        ]
        return " → ".join(texts)


def interface_of(signature: Signature) -> Interface:
    """Derive what a model takes and gives.

    Args:
        signature: of its network.
    """
    ends: Sequence[TensorInfo] = (*signature.inputs, *signature.outputs)
    batch = signature.batch
    batched = batch is not None and all(
        one.shape[:1] == (batch,) and batch not in one.shape[1:] for one in ends
    )

    def spec(one: TensorInfo) -> TensorSpec:
        sizes = one.shape[1:] if batched else one.shape
        dims = tuple(size if isinstance(size, int) else -1 for size in sizes)
        return TensorSpec(name=one.name, dtype=_NAMES[one.dtype], dims=dims or (1,), is_scalar=not dims)

    return Interface(
        inputs=tuple(map(spec, signature.inputs)),
        outputs=tuple(map(spec, signature.outputs)),
        batched=batched,
    )


def wire_dtype(name: str) -> np.dtype[Any]:
    """Look up NumPy's type of what Triton names so, in the protocol's order of bytes.

    Args:
        name: as `FP32`.

    Raises:
        KeyError: there is none.
    """
    dtype = numpy_dtype(_DTYPES[name])
    return dtype if dtype.kind == "V" else dtype.newbyteorder("<")
