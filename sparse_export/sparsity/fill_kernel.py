"""One launch that puts the values of all layers into their compressed forms. Needs triton, which torch brings along.

Gathering by torch takes two launches a form, and writes and reads the values once more in the weight's own type. There
are two ways to do better: `GatherAll` reads a place of four bytes for every value of two, and takes forms in any order
of values; `FillTiles` reads a byte for every group of four, the weight in the order in which it lies, and fills both
forms of a layer from one reading. Which is faster is for a card to say: see `FillPass`.
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

    weights: contiguous, of one type, one for each form; a weight may come several times.  places: int32.  values: of
    one type, contiguous. The tables stand until `fits` says that a tensor moved; a captured CUDA graph must not outlive
    that.
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


TILE = 64  # rows and columns of the weight that one program of `FillTiles` reads


@triton.jit  # type: ignore[untyped-decorator]
def _fill_tiles(  # type: ignore[no-untyped-def]
    weights,
    codes,
    values,
    codes_t,
    values_t,
    n_outs,
    n_ins,
    layers,
    first_rows,
    first_columns,
    WEIGHT: tl.constexpr,
    VALUE: tl.constexpr,
    BOTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """weights, codes, values, codes_t, values_t: addresses by layer.  layers, first_rows, first_columns: by program."""
    program = tl.program_id(0)
    layer = tl.load(layers + program)
    row = tl.load(first_rows + program)
    column = tl.load(first_columns + program)
    n_out = tl.load(n_outs + layer)
    n_in = tl.load(n_ins + layer)
    weight = tl.load(weights + layer).to(tl.pointer_type(WEIGHT))
    pair = tl.arange(0, 2)

    rows = row + tl.arange(0, TILE)
    groups = column // 4 + tl.arange(0, TILE // 4)
    inside = (rows < n_out)[:, None] & (groups * 4 < n_in)[None, :]
    code = tl.load(codes + layer).to(tl.pointer_type(tl.uint8))
    kept = tl.load(code + rows[:, None] * (n_in // 4) + groups[None, :], mask=inside, other=0).to(tl.int32)
    member = (kept[:, :, None] >> (2 * pair)[None, None, :]) & 3
    at = rows[:, None, None] * n_in + groups[None, :, None] * 4 + member
    read = tl.load(weight + at, mask=inside[:, :, None], other=0.0)
    value = tl.load(values + layer).to(tl.pointer_type(VALUE))
    to = rows[:, None, None] * (n_in // 2) + groups[None, :, None] * 2 + pair[None, None, :]
    tl.store(value + to, read.to(VALUE), mask=inside[:, :, None])

    if BOTH:
        columns = column + tl.arange(0, TILE)
        row_groups = row // 4 + tl.arange(0, TILE // 4)
        inside_t = (row_groups * 4 < n_out)[:, None] & (columns < n_in)[None, :]
        code_t = tl.load(codes_t + layer).to(tl.pointer_type(tl.uint8))
        kept_t = tl.load(code_t + row_groups[:, None] * n_in + columns[None, :], mask=inside_t, other=0)
        kept_t = kept_t.to(tl.int32)
        first = (row_groups[:, None] * 4 + (kept_t & 3)) * n_in + columns[None, :]
        second = (row_groups[:, None] * 4 + (kept_t >> 2)) * n_in + columns[None, :]
        read_first = tl.load(weight + first, mask=inside_t, other=0.0).to(VALUE)
        read_second = tl.load(weight + second, mask=inside_t, other=0.0).to(VALUE)
        value_t = tl.load(values_t + layer).to(tl.pointer_type(VALUE))
        to_t = columns[:, None, None] * (n_out // 2) + row_groups[None, :, None] * 2 + pair[None, None, :]
        both = tl.join(tl.trans(read_first), tl.trans(read_second))
        tl.store(value_t + to_t, both, mask=tl.trans(inside_t)[:, :, None])


class FillTiles:
    """Fills the forward forms of many layers, or both forms of each, reading every weight once.

    weights: (O, I), contiguous, of one type.  codes: uint8 (O, I / 4), which members of each group of four are kept, the
    first in the lower two bits, the second in the next.  values: (O, I / 2) kept values, row after row.
    codes_t: uint8 (O / 4, I), of the groups of four along O.  values_t: (I, O / 2), row after row of the transpose; both
    are None where only forward forms are there.  The tables stand until `fits` says that a tensor moved; a captured
    CUDA graph must not outlive that.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        codes: Sequence[Tensor],
        values: Sequence[Tensor],
        codes_t: Sequence[Tensor] | None,
        values_t: Sequence[Tensor] | None,
    ) -> None:
        device = weights[0].device
        self._both = codes_t is not None
        self._addresses = self._now(weights, codes, values, codes_t, values_t)
        self._tables = [
            torch.tensor(column, dtype=torch.int64, device=device)
            for column in zip(*self._addresses, strict=True)
        ]
        sizes = [(weight.shape[0], weight.flatten(1).shape[1]) for weight in weights]
        tiles = [
            (layer, row, column)
            for layer, (n_out, n_in) in enumerate(sizes)
            for row in range(0, n_out, TILE)
            for column in range(0, n_in, TILE)
        ]
        self._sizes = [
            torch.tensor(column, dtype=torch.int64, device=device) for column in zip(*sizes, strict=True)
        ]
        self._tiles = [
            torch.tensor(column, dtype=torch.int64, device=device) for column in zip(*tiles, strict=True)
        ]
        self._weight_type, self._value_type = _TYPES[weights[0].dtype], _TYPES[values[0].dtype]

    @staticmethod
    def can(weights: Sequence[Tensor], values: Sequence[Tensor]) -> bool:
        """Are these tensors such as one launch can take?"""
        return (
            all(one.is_contiguous() for one in (*weights, *values))
            and len({one.dtype for one in weights}) == len({one.dtype for one in values}) == 1
            and weights[0].dtype in _TYPES
            and values[0].dtype in _TYPES
        )

    @staticmethod
    def _now(*tensors: Sequence[Tensor] | None) -> list[tuple[int, ...]]:
        n = len(tensors[0] or ())
        some = [[one.data_ptr() for one in group] if group is not None else [0] * n for group in tensors]
        return list(zip(*some, strict=True))

    def fits(
        self,
        weights: Sequence[Tensor],
        codes: Sequence[Tensor],
        values: Sequence[Tensor],
        codes_t: Sequence[Tensor] | None,
        values_t: Sequence[Tensor] | None,
    ) -> bool:
        """Do the tensors still lie where they lay?"""
        return self._now(weights, codes, values, codes_t, values_t) == self._addresses

    def __call__(self) -> None:
        launch: Any = _fill_tiles[(len(self._tiles[0]),)]
        launch(
            *self._tables,
            *self._sizes,
            *self._tiles,
            WEIGHT=self._weight_type,
            VALUE=self._value_type,
            BOTH=self._both,
            TILE=TILE,
        )
