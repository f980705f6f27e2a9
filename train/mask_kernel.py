"""One launch that zeroes the inactive weights of all layers. Needs triton, which torch has for CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # entries one program looks at

_TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float64: tl.float64,
}


@triton.jit  # type: ignore[untyped-decorator]
def _zero_inactive(weights, masks, sizes, layers, starts, DTYPE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """weights, masks: addresses by layer.  sizes: entries by layer.  layers, starts: by program."""
    program = tl.program_id(0)
    layer = tl.load(layers + program)
    weight = tl.load(weights + layer).to(tl.pointer_type(DTYPE))
    mask = tl.load(masks + layer).to(tl.pointer_type(tl.int8))
    at = tl.load(starts + program) + tl.arange(0, BLOCK)
    inside = at < tl.load(sizes + layer)
    kept = tl.load(mask + at, mask=inside, other=1)
    tl.store(weight + at, 0.0, mask=inside & (kept == 0))


class ZeroInactive:
    """Zeroes every weight whose mask is off. Owns the tables of addresses on the device.

    Reads a byte a weight and writes only the zeros: a weight that is kept is not touched. The tables stand
    until `fits` says that a tensor moved; a captured CUDA graph must not outlive that.

    Args:
        weights: of one dtype, on one device, dense in memory.
        masks: bool, with the shapes and strides of the weights.
    """

    def __init__(self, weights: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
        device = weights[0].device
        self._addresses = self._now(weights, masks)
        self._weights, self._masks = (
            torch.tensor(column, dtype=torch.int64, device=device)
            for column in zip(*self._addresses, strict=True)
        )
        sizes = [weight.numel() for weight in weights]
        blocks = [range(0, size, BLOCK) for size in sizes]
        self._sizes = torch.tensor(sizes, dtype=torch.int64, device=device)
        self._layers = torch.tensor(
            [layer for layer, starts in enumerate(blocks) for _ in starts], dtype=torch.int32, device=device
        )
        self._starts = torch.tensor(
            [start for starts in blocks for start in starts], dtype=torch.int64, device=device
        )
        self._dtype = _TYPES[weights[0].dtype]

    @staticmethod
    def _now(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> list[tuple[int, int]]:
        return [(w.data_ptr(), m.data_ptr()) for w, m in zip(weights, masks, strict=True)]

    def fits(self, weights: Sequence[Tensor], masks: Sequence[Tensor]) -> bool:
        """Do the tensors still lie where they lay?"""
        return self._now(weights, masks) == self._addresses

    def __call__(self) -> None:
        _zero_inactive[(len(self._layers),)](
            self._weights,
            self._masks,
            self._sizes,
            self._layers,
            self._starts,
            DTYPE=self._dtype,
            BLOCK=BLOCK,
        )
