"""Channels of an ONNX graph put in another order, in which more of its weights fit an N:M pattern."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor

from sparse_export.errors import GateFailed, UnknownNameError, UsageError
from sparse_export.graph.channels.graph_groups import find_graph_channels
from sparse_export.graph.channels.graph_proof import difference_by_orders, reordered_graph
from sparse_export.graph.channels.graph_trace import own_parameters
from sparse_export.graph.channels.spaces import Channels
from sparse_export.graph.layers import graph_layers
from sparse_export.graph.passes.permute import (
    PermutationReport,
    Search,
    require_finite,
    searched_orders,
    searched_weight,
)
from sparse_export.graph.stored_tensors import array_of
from sparse_export.signature import Feeds
from sparse_export.sparsity.pattern import NMPattern

__all__ = ["PermutedGraph", "permute_graph", "reduction_axes", "stored_weights"]


@dataclass(frozen=True, kw_only=True)
class PermutedGraph:
    """A graph in another order of channels.

    Attributes:
        model: a new one; the very same where nothing was moved.
        report: of it; `difference` is that of outputs in float32.
        orders: by name of a stored tensor, of its shape: the place in the old one of every entry.
    """

    model: onnx.ModelProto
    report: PermutationReport
    orders: dict[str, Tensor]


def permute_graph(
    model: onnx.ModelProto,
    feeds: Sequence[Feeds],
    layers: Mapping[str, NMPattern],
    search: Search,
    *,
    scores: Mapping[str, Tensor] | None = None,
    channels: Channels | None = None,
    sizes: Mapping[str, int] | None = None,
) -> PermutedGraph:
    """Reorder channels so that more of each weight fits its pattern; what the graph computes stays what it was.

    Args:
        model: as `open_model` opens it; it stays as it is.
        feeds: inputs that the graph takes, on which outputs before and after are compared.
        layers: names of stored weights -> pattern.
        search: (rows (R, I), pattern) -> int64 permutation of I; groups are consecutive columns.
        scores: what a weight's entries are worth, of its stored shape, in place of |weight|.
        channels: what `find_graph_channels` found; None to look.
        sizes: an example of free sizes that the network takes.

    Raises:
        GateFailed: the outputs differ by more than rounding explains or cannot be compared, or weights are NaN
            or infinite.
        UnknownNameError: a name that the graph stores no weight under.
        UsageError: the search gives no permutation, or there are no inputs.
    """
    scores = scores or {}
    tensors = stored_weights(model)
    for name in (*layers, *scores):
        if name not in tensors:
            raise UnknownNameError("stored weight", name, tensors)
    if not feeds:
        raise UsageError(
            "There are no inputs to compare the outputs in both orders on.",
            do="Give real inputs, or leave the channels in their order.",
        )
    require_finite({name: tensors[name].float() for name in layers})
    found = find_graph_channels(model, sizes) if channels is None else channels
    axes = reduction_axes(model, layers)
    weights = {name: searched_weight(scores.get(name, tensors[name].float()), None) for name in layers}
    report, orders = searched_orders(
        found, tensors, layers, weights, axes, search, lambda orders: _proven(model, orders, feeds)
    )
    permuted = reordered_graph(model, orders) if orders else model
    return PermutedGraph(model=permuted, report=report, orders=orders)


def _proven(model: onnx.ModelProto, orders: Mapping[str, Tensor], feeds: Sequence[Feeds]) -> float:
    difference = difference_by_orders(model, orders, feeds)
    if not difference.ok:
        raise GateFailed(
            f"With its channels permuted the graph's outputs differ by {difference.largest:.3g} of the largest.",
            expected=f"Rounding explains at most {difference.allowed:.3g}. The graph was left as it was.",
            do="Leave the channels in their order, and report the network; a rule for one of its operators is "
            "wrong.",
        )
    return difference.largest


def stored_weights(model: onnx.ModelProto) -> dict[str, Tensor]:
    """The stored floats of a graph whose entries may be put in another order, by name; bfloat16 as float32."""
    found = {}
    for name, tensor in own_parameters(model).items():
        array = array_of(tensor)
        known = array.astype("float32") if array.dtype.kind not in "f" else array
        found[name] = torch.from_numpy(known.copy())
    return found


def reduction_axes(model: onnx.ModelProto, names: Mapping[str, object]) -> dict[str, int | None]:
    """The axis of each stored weight that its layers sum over; None where they differ or it is not clear."""
    found: dict[str, set[int | None]] = {}
    for layer in graph_layers(model):
        if layer.weight in names:
            found.setdefault(layer.weight, set()).add(layer.stored_axis)
    return {name: next(iter(axes)) if len(axes := found.get(name, set())) == 1 else None for name in names}
