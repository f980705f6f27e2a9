"""What stands behind a layer in a graph: its bias, and the value that its output is added to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from sparse_export.graph.stored_tensors import Read, array_of
from sparse_export.oneshot.graph_weights import GraphWeight
from sparse_export.oneshot.wiring import Wiring
from sparse_export.signature import Array

__all__ = ["Link", "Place", "links_of", "wanted_of"]

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
_LEAST_GAIN = 1e-3  # of a batch norm, for what a sum has lost to be made up for before it


@dataclass(frozen=True, kw_only=True)
class Place:
    """A stored tensor that shifts each output channel of a layer.

    Attributes:
        name: of it; nothing else reads it.
        sign: -1 for the mean of a batch norm, which is taken off.
    """

    name: str
    sign: int = 1


@dataclass(frozen=True, kw_only=True)
class Link:
    """A layer with what stands behind it.

    Attributes:
        value: its output.
        axis: of the channels in that; -1 is the last.
        bias: stored tensor that the layer itself adds; None where it adds none.
        place: where a shift can be put; None where it cannot.
        beside: value that the output is added to, known before the layer; None where there is none.
        gain: of the output's channels on the way to that sum, (O,).
    """

    value: str
    axis: int
    bias: str | None = None
    place: Place | None = None
    beside: str | None = None
    gain: Array | None = None

    @property
    def values(self) -> tuple[str, ...]:
        """What is looked at in the dense network."""
        return (self.value,) if self.beside is None else (self.value, self.beside)


def links_of(
    model: onnx.ModelProto,
    wiring: Wiring,
    weights: Iterable[GraphWeight],
    *,
    sums: bool,
    read: Read = array_of,
) -> dict[str, Link]:
    """The layers whose outputs can be held against the dense network's, by the name of their weight.

    Args:
        model: the graph.
        wiring: of it.
        weights: those that are pruned; such as several layers multiply by, stacks of matrices and transposed
            convolutions are left out.
        sums: look for what outputs are added to.
        read: gives the values of what the model stores.
    """
    finder = _Finder(model, wiring, read)
    found = {weight.name: finder.link(weight, sums=sums) for weight in weights}
    return {name: link for name, link in found.items() if link is not None}


def wanted_of(
    link: Link, dense: Mapping[str, Array], pruned: Mapping[str, Array], bias: Array | None
) -> Tensor:
    """What the layer alone should give, float32 (inputs, O), in the order in which `inputs_of` has the inputs.

    Args:
        link: of the layer.
        dense: values of the dense network.
        pruned: values of the pruned network; that which the output is added to is needed.
        bias: that the layer itself adds.
    """
    wanted = _rows(dense[link.value], link.axis)
    if bias is not None:
        wanted = wanted - torch.from_numpy(bias.astype(np.float32).reshape(-1))
    if link.beside is None or dense[link.beside].shape != dense[link.value].shape:
        return wanted
    lost = _rows(dense[link.beside], link.axis) - _rows(pruned[link.beside], link.axis)
    if link.gain is not None:
        gain = torch.from_numpy(link.gain.astype(np.float32))
        lost = torch.where(gain.abs() > _LEAST_GAIN, lost / gain, 0.0)
    return wanted + lost


def _rows(value: Array, axis: int) -> Tensor:
    wide = torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32))
    wide = wide.movedim(axis, -1)
    return wide.reshape(-1, wide.shape[-1])


class _Finder:
    def __init__(self, model: onnx.ModelProto, wiring: Wiring, read: Read) -> None:
        self._nodes, self._wiring, self._read = model.graph.node, wiring, read
        self._stored = {one.name: one for one in model.graph.initializer if one.data_type in _FLOATS}
        self._readers: dict[str, list[int]] = {}
        for index, names in enumerate(wiring.reads):
            for name in names:
                self._readers.setdefault(name, []).append(index)

    def link(self, weight: GraphWeight, *, sums: bool) -> Link | None:
        if weight.unseen or len(weight.uses) != 1:
            return None
        (use,) = weight.uses
        node, factor = self._nodes[use.node], use.factor
        if factor.stack or factor.transposed:
            return None
        n_outputs = weight.form.shape[0]
        is_second = factor.kernel is None and node.input[1] == factor.value
        axis = 1 if factor.kernel is not None else -2 if is_second else -1
        link = Link(value=node.output[0], axis=axis)
        own = node.input[2] if len(node.input) > 2 and node.input[2] else None
        at = node.output[0]
        gain: Array | None = None
        if own is not None:
            if not self._is_own(own, use.node, n_outputs) or _beta(node) != 1.0 or axis == -2:
                return None
            link = Link(value=at, axis=axis, bias=own, place=Place(name=own))
        else:
            rank = len(weight.form.shape) if factor.kernel is not None else 2
            place, after, gain = self._behind(at, n_outputs, axis, rank)
            if place is not None:
                link = Link(value=at, axis=axis, place=place)
                at = after
        beside = self._beside(at, use.node) if sums else None
        if beside is None:
            return link
        return Link(value=link.value, axis=axis, bias=link.bias, place=link.place, beside=beside, gain=gain)

    def _only_reader(self, value: str) -> int | None:
        readers = self._readers.get(value, [])
        return readers[0] if len(readers) == 1 and value not in self._wiring.outputs else None

    def _is_own(self, name: str, node: int, n_outputs: int) -> bool:
        """Is it a stored vector, one number for each output, that this node alone reads?"""
        tensor = self._stored.get(name)
        return (
            tensor is not None
            and int(np.prod(tensor.dims)) == n_outputs
            and self._only_reader(name) == node
            and list(self._nodes[node].input).count(name) == 1
        )

    def _behind(
        self, value: str, n_outputs: int, axis: int, rank: int
    ) -> tuple[Place | None, str, Array | None]:
        """The bias that a node behind the layer adds, that node's output, and its gain."""
        nothing = (None, value, None)
        index = self._only_reader(value)
        if index is None:
            return nothing
        node = self._nodes[index]
        if node.op_type == "Add":
            other = node.input[0] if node.input[1] == value else node.input[1]
            if not self._is_own(other, index, n_outputs):
                return nothing
            dims = list(self._stored[other].dims)
            from_end = axis if axis < 0 else axis - rank
            if len(dims) < -from_end or dims[from_end] != n_outputs:
                return nothing
            return Place(name=other), node.output[0], None
        if node.op_type == "BatchNormalization" and node.input[0] == value and axis == 1:
            attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
            if attributes.get("training_mode", 0) or not self._is_own(node.input[3], index, n_outputs):
                return nothing
            scale, variance = (self._stored.get(node.input[at]) for at in (1, 4))
            gain = None
            if scale is not None and variance is not None:
                spread = np.sqrt(self._read(variance).astype(np.float64) + attributes.get("epsilon", 1e-5))
                gain = self._read(scale).astype(np.float64) / spread
            after = node.output[0] if gain is not None else ""
            return Place(name=node.input[3], sign=-1), after, gain
        return nothing

    def _beside(self, value: str, layer: int) -> str | None:
        """What the value is added to, where that is known before the layer runs."""
        index = self._only_reader(value) if value else None
        if index is None or self._nodes[index].op_type != "Add":
            return None
        first, second = self._nodes[index].input
        other = second if first == value else first
        if other == value or other in self._wiring.stored:
            return None
        maker = self._wiring.makers.get(other)
        if maker is None:
            return other if other in self._wiring.inputs else None
        return None if maker >= layer or maker in self._wiring.constant else other


def _beta(node: onnx.NodeProto) -> float:
    found = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    return float(found.get("beta", 1.0)) if node.op_type == "Gemm" else 1.0
