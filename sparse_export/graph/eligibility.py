"""Whether hardware that knows 2:4 can use the zeros of one weight, and why not.

What is known: the sparse matrix instructions of NVIDIA's GPUs take 2:4 along the reduction axis for 16- and
8-bit types and 1:2 for TF32; cuSPARSELt wants rows and columns in multiples of 16 or 32; TensorRT looks at
constant weights of Conv, Gemm and MatMul. Where only a measurement could tell, the answer is `unproven`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sparse_export.formats.layers import Eligible, Reason, ReasonCode

__all__ = [
    "MEANINGS",
    "MISSING",
    "WeightUse",
    "could_be_used",
    "reasons_if_pruned",
    "reasons_of",
    "verdict",
]

GROUP = 4  # 2:4
_ALIGNMENT = {2: 16, 1: 32}  # bytes of a type: multiple that cuSPARSELt wants of rows and columns
_SMALL = 256  # channels below which sparse kernels seldom win, by TensorRT's engineers
_BYTES = {"float16": 2, "bfloat16": 2, "int8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1}

# What each code says about hardware, and in words. docs/verifier.md tells what to do.
MEANINGS: dict[ReasonCode, tuple[Eligible, str]] = {
    "groups-over": ("no", "groups of four with more than two nonzeros along the reduction axis"),
    "indivisible": ("no", "four does not divide the reduction axis, as in the stem of an image network"),
    "depthwise": ("no", "each output reads one channel: there is nothing to leave out of four"),
    "grouped": ("no", "TensorRT has no sparse kernels for grouped convolutions"),
    "vector": ("no", "a vector, not a matrix"),
    "empty": ("no", "the weight has no entries"),
    "float32": ("no", "hardware knows 2:4 for 16- and 8-bit types; of TF32 it wants 1:2"),
    "other-type": ("no", "no sparse matrix instruction takes this type"),
    "zero-point": ("no", "zeros are stored as a zero point that is not 0, so hardware sees no zeros"),
    "sparse-initializer": ("no", "TensorRT's parser refuses sparse initializers"),
    "not-constant": ("no", "the weight depends on an input of the graph"),
    "activations": ("no", "multiplies two activations, as attention does: there is no weight"),
    "int8": ("unproven", "int8 by Q/DQ: TensorRT is reported not to pick sparse kernels"),
    "weight-only": ("unproven", "only the weight is quantized: which kernel multiplies is not known"),
    "unaligned": ("unproven", "channels not in the multiples that cuSPARSELt wants"),
    "kernel-unknown": ("unproven", "no sparse kernel is known for this kind of product"),
    "masked-in-graph": ("unproven", "the zeros come from a mask in the graph; the stored weight is dense"),
    "computed": ("unproven", "nodes compute the weight; whether they are folded first is not known"),
    "overridable": ("unproven", "the weight is an input too: the caller may replace it"),
    "subgraph": ("unproven", "stands in a branch or a loop"),
    "not-evaluated": ("unproven", "the weight is constant, but its values were not worked out"),
    "not-looked-into": ("unproven", "has weights, but is no operator that is looked into"),
    "shared": ("yes", "the stored weight is used elsewhere too"),
    "quantized": ("yes", "the weight is quantized already"),
    "small": ("yes", "fewer than 256 inputs or outputs, where sparse kernels seldom win"),
    "not-finite": ("yes", "the magnitude of the weight is not finite"),
}

# What rules a layer out but can be mended by another export, and how.
MISSING: dict[ReasonCode, str] = {
    "float32": "float16, bfloat16 or int8",
    "other-type": "float16, bfloat16 or int8",
    "zero-point": "symmetric quantization",
    "sparse-initializer": "dense storage",
}


def reason(code: ReasonCode, text: str = "") -> Reason:
    """A reason with its own sentence, or with the general one."""
    general = MEANINGS[code][1]
    return Reason(code=code, text=text or f"{general[0].upper()}{general[1:]}.")


def verdict(reasons: Sequence[Reason]) -> Eligible:
    """`no` when one reason says so, else `unproven` when one does, else `yes`."""
    found = {MEANINGS[one.code][0] for one in reasons}
    return "no" if "no" in found else "unproven" if "unproven" in found else "yes"


@dataclass(frozen=True, kw_only=True)
class WeightUse:
    """How one node multiplies by one weight, known in full.

    shape, dtype: of the weight as it is multiplied, dtype being the quantized type where both sides are
    quantized.  n_reduced, n_outputs: lengths of the sum and of the other side, within one group of channels.
    n_groups, n_groups_over: for 2:4, None where four does not divide n_reduced.  masked_by: node and mask
    that put zeros into the weight, in words.  stored_as: the type that it is quantized to in the file, None
    where it is not.  computed_by: operators on the way that change more than layout
    or type.
    """

    op_type: str
    shape: tuple[int, ...]
    dtype: str
    n_reduced: int
    n_outputs: int
    channel_groups: int
    n_groups: int | None
    n_groups_over: int | None
    stored_as: str | None
    on_left: bool
    n_matrices: int
    weight_only: bool
    zero_point: bool
    masked_by: str | None
    computed_by: tuple[str, ...]
    sparse_initializer: bool
    overridable: bool
    in_subgraph: bool


@functools.lru_cache(maxsize=1024)  # layers of a network are often alike
def reasons_of(use: WeightUse) -> tuple[Reason, ...]:
    """All that stands against the hardware's use of the zeros; shared weights are for the caller to add."""
    return tuple(
        (*_of_shape(use), *_of_type(use), *_of_kernel(use), *_of_way(use))
        if 0 not in use.shape
        else (reason("empty"),)
    )


@functools.lru_cache(maxsize=1024)
def reasons_if_pruned(use: WeightUse, *, finite: bool) -> tuple[Reason, ...]:
    """What stands against the use of the zeros once the weight is 2:4, with what is missing to profit.

    finite: the magnitude of the weight is a finite number.
    """
    mended = reasons_of(replace(use, n_groups_over=None if use.n_groups is None else 0))
    needs = {"float32": reason("float32", f"Needs {MISSING['float32']}.")}
    found = [needs.get(one.code, one) for one in mended]
    if len(use.shape) > 1 and use.n_groups and min(use.n_reduced, use.n_outputs) < _SMALL:
        text = (
            f"{use.n_reduced} inputs and {use.n_outputs} outputs; sparse kernels seldom win below {_SMALL}."
        )
        found.append(reason("small", text))
    if not finite:
        text = "The weight has NaN or infinite entries, or a sum |w| too large for float64."
        found.append(reason("not-finite", text))
    return tuple(found)


def could_be_used(reasons: Sequence[Reason]) -> bool:
    """Does nothing rule out the use of the zeros but what another export mends?"""
    return verdict([one for one in reasons if one.code not in MISSING]) != "no"


def _of_shape(use: WeightUse) -> list[Reason]:
    if use.n_reduced == 1 and use.channel_groups > 1:
        return [reason("depthwise")]
    if use.n_groups is None:
        per = " of each channel group" if use.channel_groups > 1 else ""
        text = f"The reduction axis{per} has {use.n_reduced} entries, which {GROUP} does not divide."
        return [reason("indivisible", text)]
    if not use.n_groups_over:
        return []
    n, total = use.n_groups_over, use.n_groups
    have = "has" if n == 1 else "have"
    text = f"{n:,} of {total:,} groups of {GROUP} along the reduction axis {have} more than 2 nonzeros."
    return [reason("groups-over", text)]


def _of_type(use: WeightUse) -> list[Reason]:
    if use.dtype == "float32":
        return [reason("float32")]
    if use.dtype not in _BYTES:
        return [reason("other-type", f"No sparse matrix instruction takes {use.dtype}.")]
    found = [reason("int8")] if use.dtype == "int8" else []
    unit = _ALIGNMENT[_BYTES[use.dtype]]
    if len(use.shape) > 1 and use.n_groups is not None and (use.n_reduced % unit or use.n_outputs % unit):
        text = f"{use.n_reduced} inputs and {use.n_outputs} outputs; cuSPARSELt wants multiples of {unit}."
        found.append(reason("unaligned", text))
    return found


def _of_kernel(use: WeightUse) -> list[Reason]:
    found = []
    if use.channel_groups > 1 and use.n_reduced > 1:
        text = f"TensorRT has no sparse kernels for grouped convolutions; this one has {use.channel_groups} groups."
        found.append(reason("grouped", text))
    if len(use.shape) < 2:
        found.append(reason("vector"))
    unknown = {
        "a transposed convolution": use.op_type == "ConvTranspose",
        "a convolution over three or more axes": use.op_type == "Conv" and len(use.shape) > 4,
        "a weight on the left": use.on_left,
        f"a batch of {use.n_matrices} weights": use.n_matrices > 1,
    }
    found += [
        reason("kernel-unknown", f"No sparse kernel is known for {kind}.")
        for kind, so in unknown.items()
        if so
    ]
    return found


def _of_way(use: WeightUse) -> list[Reason]:
    found = []
    if use.weight_only:
        found.append(reason("weight-only"))
    elif use.stored_as is not None and use.stored_as != "int8":
        found.append(reason("quantized", f"The weight is quantized already, to {use.stored_as}."))
    if use.zero_point:
        found.append(reason("zero-point"))
    if use.masked_by is not None:
        text = f"The zeros come from a {use.masked_by} in the graph; the stored weight is dense; fold it."
        found.append(reason("masked-in-graph", text))
    if use.computed_by:
        text = f"The weight is computed in the graph by {', '.join(use.computed_by)}; fold it."
        found.append(reason("computed", text))
    if use.sparse_initializer:
        found.append(reason("sparse-initializer"))
    if use.overridable:
        found.append(reason("overridable"))
    if use.in_subgraph:
        found.append(reason("subgraph"))
    return found
