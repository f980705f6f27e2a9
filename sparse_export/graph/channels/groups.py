"""The spaces of channels of a torch network: those of its exported graph, under its parameters' own names."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from sparse_export.graph.channels import reasons
from sparse_export.graph.channels.graph_rules import RULES, elementwise
from sparse_export.graph.channels.graph_trace import GraphTrace
from sparse_export.graph.channels.labels import Ledger
from sparse_export.graph.channels.spaces import Channels, spaces_of
from sparse_export.graph.concrete import shapes_at
from sparse_export.graph.copies import copy_of
from sparse_export.graph.example import example_of_tensors
from sparse_export.graph.export import graphs_of_parameters, reason_of

__all__ = ["find_channels", "first_samples"]

_N_TRACED = 2  # samples: enough to tell the batch axis from others
_RULES = RULES | {"Dropout": elementwise}  # in training, which values it drops depends on chance alone


def find_channels(module: nn.Module, sample: Tensor | tuple[Tensor, ...]) -> Channels:
    """Export a network as it is in evaluation and in training, and give the spaces that are free in both.

    Args:
        module: it stays as it is; a copy is exported, at the sizes of the sample.
        sample: one input batch, of which two samples are used, or a tuple of the forward's arguments.

    Returns:
        The spaces; none for a network that cannot be exported, with the reason in `untraced`.
    """
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    floats = {name: one for name, one in tensors.items() if one.is_floating_point() and one.numel() > 1}
    ledger = Ledger({name: tuple(one.shape) for name, one in floats.items()})
    for name in _shared_storage(tensors):
        ledger.hold(name, reasons.shared_memory(name))
    axes: dict[str, int | None] = {}
    inputs = (x.cpu() for x in first_samples(sample, _N_TRACED))
    example = example_of_tensors([x.float() if x.is_floating_point() else x for x in inputs])
    with torch.random.fork_rng():
        try:
            graphs = graphs_of_parameters(copy_of(module).cpu().float().requires_grad_(False), example)
        except Exception as cause:  # noqa: BLE001 - whatever a user's forward raises, on made-up tensors too
            return Channels(spaces=(), untraced=f"The forward cannot be exported: {reason_of(cause)}")
    for graph in graphs:
        GraphTrace(graph, ledger, axes, shapes_at(graph, {}), _RULES).run()
    return Channels(spaces=tuple(spaces_of(ledger)))


def first_samples(sample: Tensor | tuple[Tensor, ...], n: int) -> tuple[Tensor, ...]:
    """Arguments for a forward of at most n samples."""
    inputs = sample if isinstance(sample, tuple) else (sample,)
    return tuple(x[:n].clone() if x.dim() else x for x in inputs)


def _shared_storage(tensors: dict[str, Tensor]) -> list[str]:
    """Names of tensors whose memory another tensor uses too."""
    counts = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel())
    return [
        name
        for name, tensor in tensors.items()
        if tensor.numel() and counts[tensor.untyped_storage().data_ptr()] > 1
    ]
