"""A stored tensor as the weight (O, I, …) that the formulas of pruning work on, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_export.graph.layer_uses import LayerUse
from sparse_export.graph.nodes import permutation
from sparse_export.graph.weight_steps import Step

__all__ = ["WeightForm", "form_of"]

_SAME = frozenset(("Identity", "Cast", "CastLike"))
_RESHAPES = frozenset(("Reshape", "Flatten", "Squeeze", "Unsqueeze"))
_DEQUANTIZES = "DequantizeLinear"


@dataclass(frozen=True, kw_only=True)
class _Transpose:
    axes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _Reshape:
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class WeightForm:
    """The way between a stored tensor and (O, I, …), whose axis 1 is summed over, for one layer.

    Attributes:
        stored: shape of the stored tensor.
        shape: (O, I, …).
        n_groups: the blocks of rows that multiply different inputs: channel groups of a convolution, matrices
            of a stack.
    """

    stored: tuple[int, ...]
    shape: tuple[int, ...]
    n_groups: int
    _steps: tuple[_Transpose | _Reshape, ...]

    @property
    def n_columns(self) -> int:
        return math.prod(self.shape[1:])

    def weight_of(self, stored: Tensor) -> Tensor:
        """A tensor of the stored shape as (O, I, …)."""
        for step in self._steps:
            stored = stored.permute(step.axes) if isinstance(step, _Transpose) else stored.reshape(step.after)
        return stored

    def stored_of(self, weight: Tensor) -> Tensor:
        """The inverse of `weight_of`, contiguous."""
        for step in reversed(self._steps):
            if isinstance(step, _Transpose):
                weight = weight.permute([step.axes.index(axis) for axis in range(len(step.axes))])
            else:
                weight = weight.reshape(step.before)
        return weight.contiguous()

    def is_along(self, other: WeightForm) -> bool:
        """Do both have the same columns in each row, so that one mask and one Gram matrix serve both?"""
        if self == other:
            return True
        if (self.stored, self.shape, self.n_groups) != (other.stored, other.shape, other.n_groups):
            return False
        places = torch.arange(math.prod(self.stored)).reshape(self.stored)
        return torch.equal(self.weight_of(places), other.weight_of(places))


def form_of(use: LayerUse) -> WeightForm | str:
    """The form of a layer's weight, or why the values of what is stored for it cannot be pruned: a clause."""
    if use.packed:
        return "it is stored packed"
    if use.weight.sparse:
        return "a sparse initializer stores it"
    ways = [_on_the_way(step) for step in reversed(use.steps)]
    wrong = next((way for way in ways if isinstance(way, str)), None)
    if wrong is not None:
        return wrong
    shape = tuple(use.weight.values.shape)
    if len(shape) < 2:
        return "it is a vector"
    stored = tuple(use.steps[-1].shape) if use.steps else shape
    steps = [step for way in ways if not isinstance(way, str) for step in way]
    own, n_groups = _of_layer(use, shape)
    steps += own
    found = WeightForm(stored=stored, shape=(), n_groups=n_groups, _steps=tuple(steps))
    result = tuple(found.weight_of(torch.empty(stored, device="meta")).shape)
    return WeightForm(stored=stored, shape=result, n_groups=n_groups, _steps=found._steps)


def _on_the_way(step: Step) -> Sequence[_Transpose | _Reshape] | str:
    """What a node between stored tensor and layer does to the places of values."""
    operator = step.node.op_type
    if operator == _DEQUANTIZES:
        return "it is quantized already"
    if operator in _SAME:
        return []
    if operator == "Transpose":
        return [_Transpose(axes=permutation(step.node, len(step.shape)))]
    if operator in _RESHAPES:
        return [_Reshape(before=tuple(step.shape), after=tuple(step.after))]
    return f"the graph computes it by {operator}; fold it"


def _of_layer(use: LayerUse, shape: tuple[int, ...]) -> tuple[list[_Transpose | _Reshape], int]:
    """From the weight as a layer multiplies by it to (O, I, …), and the number of groups."""
    operator, groups = use.node.op_type, use.channel_groups
    if operator == "Conv":
        return [], groups
    if operator == "ConvTranspose":  # (I, O / groups, …): every place of the input multiplies all outputs
        split = (groups, shape[0] // groups, math.prod(shape[1:]))
        joined = (groups * split[2], split[1])
        return [
            _Reshape(before=shape, after=split),
            _Transpose(axes=(0, 2, 1)),
            _Reshape(before=(split[0], split[2], split[1]), after=joined),
        ], groups
    last = len(shape) - 1
    turned = [] if use.axis == last else [_Transpose(axes=(*range(last - 1), last, last - 1))]
    if len(shape) == 2:
        return [*turned], 1
    before = (*shape[:-2], shape[-1], shape[-2]) if turned else shape
    return [*turned, _Reshape(before=before, after=(math.prod(before[:-1]), before[-1]))], math.prod(
        shape[:-2]
    )
