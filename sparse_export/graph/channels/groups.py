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
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from sparse_export.graph.channels.labels import FIXED, AxisRecord, Ledger, hash_of, mixed
from sparse_export.graph.channels.trace import ChannelTrace, ForwardFailed, Tracer

_N_TRACED = 2  # samples: enough to tell the batch axis from others


@dataclass(frozen=True, kw_only=True)
class Member:
    """An axis of a parameter or buffer that a space lies on.

    slots: int64 (width, block): entries of the axis that belong to each channel. More than one where a
        convolution's map was flattened.  groups: of a grouped convolution whose axis 1 this is; each block of
        axis 0 has its own order, and entries are counted block by block.  reads: it meets values of the
        channels.
    """

    name: str
    axis: int
    groups: int
    slots: Tensor
    reads: bool


@dataclass(frozen=True, kw_only=True)
class Space:
    """Channels that have one order wherever they occur.

    free: they may be permuted; else `reason` says why not.
    """

    name: str
    width: int
    members: tuple[Member, ...]
    free: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class Channels:
    """The spaces of a network, those that are free first. untraced: why nothing could be found, or empty."""

    spaces: tuple[Space, ...]
    untraced: str = ""

    @property
    def free(self) -> tuple[Space, ...]:
        return tuple(space for space in self.spaces if space.free)


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
        ledger.hold(name, f"{name} shares its memory with another tensor")
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


# From the ledger to spaces


def spaces_of(ledger: Ledger) -> Iterator[Space]:
    """The spaces of a ledger: free ones, then what stays, grouped by where it lies and why."""
    n = len(ledger.roots())
    reasons = _reasons(ledger)
    home, uses = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
    for key, record in ledger.axes.items():
        roots, there = _on(ledger, record)
        home.index_add_(0, roots, torch.full((len(roots),), hash_of(key)))
        uses.index_add_(0, roots, mixed(record.uses[there], hash_of(key)))
    for i, record in enumerate(ledger.sums):
        roots, there = _on(ledger, record)
        uses.index_add_(0, roots, mixed(record.uses[there], hash_of("sum", i)))

    occurring = (home != 0).nonzero()[:, 0]
    groups: dict[tuple[int, int], list[int]] = {}
    for root in occurring.tolist():
        if root not in reasons:
            groups.setdefault((int(home[root]), int(uses[root])), []).append(root)
    space_of: dict[int, int] = {}
    sizes: list[int] = []
    told: list[str] = []
    for roots_of_one in (g for g in groups.values() if len(g) > 1):
        for root in roots_of_one:
            space_of[root] = len(sizes)
        sizes.append(len(roots_of_one))
        told.append("")
    single: dict[int, list[int]] = {}
    for (where, _), roots_of_one in groups.items():
        if len(roots_of_one) == 1:
            single.setdefault(where, []).extend(roots_of_one)
    for roots_of_one in single.values():
        reason = _who_tells_apart(ledger, roots_of_one)
        for root in roots_of_one:
            space_of[root] = len(sizes)
        sizes.append(len(roots_of_one))
        told.append(reason)
    stuck: dict[tuple[int, str], list[int]] = {}
    for root in occurring.tolist():
        if root in reasons:
            stuck.setdefault((int(home[root]), reasons[root]), []).append(root)
    for (_, reason), roots_of_one in stuck.items():
        for root in roots_of_one:
            space_of[root] = len(sizes)
        sizes.append(len(roots_of_one))
        told.append(reason)

    members = _members(ledger, space_of, sizes)
    names: Counter[str] = Counter()
    for i, width in enumerate(sizes):
        base = f"{members[i][0].name}[{members[i][0].axis}]"
        names[base] += 1
        name = base if names[base] == 1 else f"{base}#{names[base]}"
        yield Space(name=name, width=width, members=tuple(members[i]), free=not told[i], reason=told[i])


def _on(ledger: Ledger, record: AxisRecord) -> tuple[Tensor, Tensor]:
    """Representatives on an axis, and the entries where there are any."""
    there = (record.atoms >= 0).nonzero()[:, 0]
    return ledger.roots()[record.atoms[there]], there


def _reasons(ledger: Ledger) -> dict[int, str]:
    """Representatives that have to stay, each with the first reason."""
    found: dict[int, str] = {}

    def note(roots: Tensor, reason: str) -> None:
        for root in roots.tolist():
            found.setdefault(root, reason)

    for atoms, reason in ledger.pins:
        note(ledger.roots()[atoms].unique(), reason)
    for key, record in ledger.axes.items():
        roots, there = _on(ledger, record)
        if key.name in ledger.held:
            note(roots, ledger.held[key.name])
        counted = roots if record.makes else mixed(roots, record.uses[there])
        _, index, counts = counted.unique(return_inverse=True, return_counts=True)
        note(roots[counts[index] > 1], f"{record.where}: several entries of {key.name} are one channel")
    return found


def _who_tells_apart(ledger: Ledger, roots: list[int]) -> str:
    if len(roots) == 1:
        return "there is one channel"
    n = len(ledger.roots())
    for record in (*ledger.axes.values(), *ledger.sums):
        total = torch.zeros(n, dtype=torch.int64)
        on, there = _on(ledger, record)
        total.index_add_(0, on, mixed(record.uses[there], 1))
        if len(total[roots].unique()) > len(roots) // 2:
            return f"{record.where} treats each channel differently"
    return "several operations together treat each channel differently"


def _members(ledger: Ledger, space_of: dict[int, int], sizes: list[int]) -> list[list[Member]]:
    n = len(ledger.roots())
    space = torch.full((n,), FIXED)
    for root, i in space_of.items():
        space[root] = i
    members: list[list[Member]] = [[] for _ in sizes]
    for key, record in ledger.axes.items():
        roots, there = _on(ledger, record)
        order = record.uses[there].argsort(stable=True)
        roots, there = roots[order], there[order]
        order = roots.argsort(stable=True)
        roots, there = roots[order], there[order]
        for i in space[roots].unique().tolist():
            if i < 0:
                continue
            slots = there[space[roots] == i]
            n_each = len(slots) // sizes[i] if len(slots) % sizes[i] == 0 else 1  # 1: among those that stay
            members[i].append(
                Member(
                    name=key.name,
                    axis=key.axis,
                    groups=key.groups,
                    slots=slots.reshape(-1, n_each),
                    reads=record.reads,
                )
            )
    return members
