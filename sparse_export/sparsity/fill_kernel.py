"""One launch that gathers the values of all layers into their compressed forms. Needs triton, which torch
brings along.

Gathering by torch takes two launches a form, and writes and reads the values once more in the weight's own
type.  Another way was tried: a program reads a tile of the weight once and fills both forms from it, by two
bits a value in place of a place of four bytes. On an H100 it took longer (2.8 ms for ViT-L/16 with both
forms, against 2.1 ms).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # values one program gathers

_TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


@triton.jit  # type: ignore[untyped-decorator]
def _gather_all(  # type: ignore[no-untyped-def]
    weights,
    places,
    values,
    sizes,
    forms,
    starts,
    WEIGHT: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """weights, places, values: addresses by form.  sizes: values by form.  forms, starts: by program."""
    program = tl.program_id(0)
    form = tl.load(forms + program)
    weight = tl.load(weights + form).to(tl.pointer_type(WEIGHT))
    place = tl.load(places + form).to(tl.pointer_type(tl.int32))
    value = tl.load(values + form).to(tl.pointer_type(VALUE))
    at = tl.load(starts + program) + tl.arange(0, BLOCK)
    inside = at < tl.load(sizes + form)
    wanted = tl.load(place + at, mask=inside, other=0)
    found = tl.load(weight + wanted, mask=inside, other=0.0)
    tl.store(value + at, found.to(VALUE), mask=inside)


class GatherAll:
    """Fills many compressed forms from their weights. Owns the tables of addresses on the device.

    weights: contiguous, of one type, one for each form; a weight may come several times.  places: int32.
    values: of one type, contiguous. The tables stand until `fits` says that a tensor moved; a captured CUDA
    graph must not outlive that.
    """

    def __init__(self, weights: Sequence[Tensor], places: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        device = weights[0].device
        self._addresses = self._now(weights, places, values)
        self._weights, self._places, self._values = (
            torch.tensor(column, dtype=torch.int64, device=device)
            for column in zip(*self._addresses, strict=True)
        )
        sizes = [one.numel() for one in values]
        blocks = [range(0, size, BLOCK) for size in sizes]
        self._sizes = torch.tensor(sizes, dtype=torch.int64, device=device)
        self._forms = torch.tensor(
            [form for form, starts in enumerate(blocks) for _ in starts], dtype=torch.int32, device=device
        )
        self._starts = torch.tensor(
            [start for starts in blocks for start in starts], dtype=torch.int64, device=device
        )
        self._weight_type, self._value_type = _TYPES[weights[0].dtype], _TYPES[values[0].dtype]

    @staticmethod
    def can(weights: Sequence[Tensor], places: Sequence[Tensor], values: Sequence[Tensor]) -> bool:
        """Are these tensors such as one launch can take?"""
        return (
            all(one.is_contiguous() for some in (weights, places, values) for one in some)
            and {one.dtype for one in weights} <= _TYPES.keys()
            and {one.dtype for one in values} <= _TYPES.keys()
            and len({one.dtype for one in weights}) == len({one.dtype for one in values}) == 1
            and {one.dtype for one in places} == {torch.int32}
        )

    @staticmethod
    def _now(*tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
        return [tuple(one.data_ptr() for one in group) for group in zip(*tensors, strict=True)]

    def fits(self, weights: Sequence[Tensor], places: Sequence[Tensor], values: Sequence[Tensor]) -> bool:
        """Do the tensors still lie where they lay?"""
        return self._now(weights, places, values) == self._addresses

    def __call__(self) -> None:
        launch: Any = _gather_all[(len(self._forms),)]
        launch(
            self._weights,
            self._places,
            self._values,
            self._sizes,
            self._forms,
            self._starts,
            WEIGHT=self._weight_type,
            VALUE=self._value_type,
            BLOCK=BLOCK,
        )
