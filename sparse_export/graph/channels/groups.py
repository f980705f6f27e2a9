"""Which channels of a network may change places: the spaces of channels that share one order.

`find_channels` traces a network with torch.fx and follows labels through it (`trace.py`). Channels
that every weight, norm, sum and join treats alike form a space: any permutation of it, applied to all its
members at once, is a re-labelling that leaves the function as it was. Whatever is not known stays in place,
with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from sparse_export.graph.channels import reasons
from sparse_export.graph.channels.labels import Ledger
from sparse_export.graph.channels.spaces import Channels, spaces_of
from sparse_export.graph.channels.trace import ChannelTrace, ForwardFailed, Tracer

_N_TRACED = 2  # samples: enough to tell the batch axis from others


def find_channels(module: nn.Module, sample: Tensor | tuple[Tensor, ...]) -> Channels:
    """Trace a network and give its spaces of channels. The network is left as it was, mode and buffers too.

    sample: one input batch, of which two samples are used, or a tuple of the forward's arguments. The network
    is traced as it is in evaluation and as it is in training: what holds only in one of them is not free. One
    that cannot be traced has no spaces, and `untraced` says why.
    """
    inputs = first_samples(sample, _N_TRACED)
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    shared = _shared_storage(tensors)
    ledger = Ledger({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    names = {id(tensor): name for name, tensor in tensors.items()}
    for name in shared:
        ledger.hold(name, reasons.shared_memory(name))
    axes: dict[str, int | None] = {}
    with _undisturbed(module), torch.no_grad():
        try:
            expected = module(*(x.clone() for x in inputs))
            graphs = _graphs(module)
        except Exception as cause:  # noqa: BLE001 - whatever a user's forward raises, on a proxy too
            return _untraced(cause)
        for i, graph in enumerate(graphs):
            try:
                found = ChannelTrace(module, graph, ledger, names, axes).run(*(x.clone() for x in inputs))
            except ForwardFailed as failure:
                return _untraced(failure.__cause__ or failure)
            if i == 0 and not _same(found, expected):
                return Channels(spaces=(), untraced="The traced graph computes something else.")
    return Channels(spaces=tuple(spaces_of(ledger)))


def _untraced(cause: BaseException) -> Channels:
    reason = str(cause).strip().partition("\n")[0] or "no message"
    return Channels(spaces=(), untraced=f"The forward cannot be traced: {type(cause).__name__}: {reason}")


def first_samples(sample: Tensor | tuple[Tensor, ...], n: int) -> tuple[Tensor, ...]:
    """Arguments for a forward of at most n samples."""
    inputs = sample if isinstance(sample, tuple) else (sample,)
    return tuple(x[:n].clone() if x.dim() else x for x in inputs)


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """In evaluation mode, with modes, buffers, attributes and the random state put back afterwards."""
    training = [(part, part.training) for part in module.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    attributes = set(vars(module))
    module.eval()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for part, mode in training:
            part.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for name in set(vars(module)) - attributes:  # the tracer leaves constants on the module
            delattr(module, name)


def _graphs(module: nn.Module) -> list[fx.Graph]:
    """The graph in evaluation, and that in training where it is another one."""
    evaluation = Tracer().trace(module)
    modes = [(part, part.training) for part in module.modules()]
    module.train()
    try:
        training = Tracer().trace(module)
    finally:
        for part, mode in modes:
            part.training = mode
    text = (
        str(training)
        .replace("training = True", "training = False")
        .replace("'training': True", "'training': False")
    )
    same = text == str(evaluation)
    return [evaluation] if same else [evaluation, training]


def _same(a: object, b: object) -> bool:
    leaves_a, leaves_b = tree_flatten(a)[0], tree_flatten(b)[0]
    if len(leaves_a) != len(leaves_b):
        return False
    for x, y in zip(leaves_a, leaves_b, strict=True):
        x = getattr(x, "value", x)
        if isinstance(x, Tensor) and not torch.allclose(x, y, rtol=1e-3, atol=1e-5, equal_nan=True):
            return False
    return True


def _shared_storage(tensors: dict[str, Tensor]) -> list[str]:
    """Names of tensors whose memory another tensor uses too."""
    counts = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel())
    return [
        name
        for name, tensor in tensors.items()
        if tensor.numel() and counts[tensor.untyped_storage().data_ptr()] > 1
    ]
