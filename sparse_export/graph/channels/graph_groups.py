"""The spaces of channels of an ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from sparse_export.graph.channels.graph_rules import RULES
from sparse_export.graph.channels.graph_trace import GraphTrace, is_indifferent, own_parameters
from sparse_export.graph.channels.labels import Ledger
from sparse_export.graph.channels.spaces import Channels, spaces_of
from sparse_export.graph.concrete import free_sizes, shapes_at, two_examples
from sparse_export.graph.stored_tensors import array_of

__all__ = ["find_graph_channels"]


def find_graph_channels(model: onnx.ModelProto, sizes: Mapping[str, int] | None = None) -> Channels:
    """Follow labels through a graph and give its spaces of channels.

    Each free size is followed at two numbers, and only what holds at both is free.

    Args:
        model: as `open_model` opens it; it stays as it is.
        sizes: an example of free sizes, by name, that the network takes; the others are chosen.
    """
    shapes = {
        name: tuple(tensor.dims)
        for name, tensor in own_parameters(model).items()
        if not is_indifferent(array_of(tensor))
    }
    ledger = Ledger(shapes)
    axes: dict[str, int | None] = {}
    for chosen in _two_sizes(model, sizes or {}):
        GraphTrace(model, ledger, axes, shapes_at(model, chosen), RULES).run()
    return Channels(spaces=tuple(spaces_of(ledger)))


def _two_sizes(model: onnx.ModelProto, sizes: Mapping[str, int]) -> list[dict[str, int]]:
    places = free_sizes(model)
    if not places:
        return [{}]
    first, second = two_examples(places)
    for name, at in places.items():
        if any(axis == 0 for _, axis in at):
            first[name], second[name] = first[name] - 1, second[name] - 1
        if name in sizes:
            first[name], second[name] = sizes[name], _another(sizes[name])
    return [first, second]


def _another(size: int) -> int:
    """A number that a network takes as well, which is likely where it is smaller and divisible alike."""
    step = next((step for step in (64, 32, 16, 8, 4, 2, 1) if size % step == 0 and size > step), -1)
    return size - step
