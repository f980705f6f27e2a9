"""Makes layers of a trained network obey an N:M pattern by the order of their channels, cutting little or
nothing.

A layer is made to obey the pattern whole, or left as it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from sparse_export.errors import ArtefactError
from sparse_export.formats.bundle import PatternLayer, PatternMethod
from sparse_export.graph.channels.orders import apply_record, record_of, reordered
from sparse_export.graph.channels.spaces import Channels
from sparse_export.graph.passes.patterned import Gather, GraphNetwork, Patterned, TorchNetwork
from sparse_export.graph.passes.permute import (
    PermutationReport,
    movable_weights,
    preview,
    reduction_axis,
    require_finite,
)
from sparse_export.signature import Feeds
from sparse_export.sparsity.lossless import cut_share, least_cut_share, least_cutting_order
from sparse_export.sparsity.pattern import NMPattern, groups_over, largest_per_group, obeys

__all__ = ["Fitted", "Gather", "fit_graph", "fit_pattern", "replay"]

_NO_ROOM = "some rows have more nonzeros than it allows"


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What `fit_pattern` did.

    layers: in the order they were asked for.  gathers: weight name -> the order, int64 (I,), of its columns
    and of its layer's input in which it obeys the pattern; the network itself still has them in the old
    order.  record: of the permutation; document: all that `replay` needs, as data for JSON.  difference: see
    PatternInfo.
    """

    layers: tuple[PatternLayer, ...]
    gathers: dict[str, Tensor]
    document: dict[str, Any]
    difference: float

    @property
    def obeying(self) -> tuple[str, ...]:
        """The weights that obey the pattern now, or will under their gather."""
        return tuple(layer.name for layer in self.layers if layer.road != "dense")


def fit_pattern(
    module: nn.Module,
    sample: Tensor,
    pattern: NMPattern,
    names: Sequence[str],
    *,
    masks: Mapping[str, Tensor],
    max_cut: float = 0.0,
    gather: Gather = "input",
    uncut: Mapping[str, str] | None = None,
    dense: Mapping[str, str] | None = None,
    live_first: bool = False,
    seed: int = 0,
) -> Fitted:
    """Permute the channels of a network in place so that weights obey a pattern; cut those that are allowed
    to be.

    sample: one input batch, floats.  names: parameters that are to obey it, if they can.  masks: permuted and
    cut with their weights, in place; projections of an attention take part where they have one.  max_cut:
    share of sum |w| that a layer may lose, from 0 to below 1; the smallest of a group go.  gather: which
    layers may be given their input in an order of their own, those that read the network's `input` as it is,
    `any` or `none`.  uncut: weights that may lose nothing whatever max_cut says, each with the reason.
    dense: weights that are to stay as they are, likewise.  live_first: have channels that nobody reads last.

    The function stays what it was but for cuts; `permute_network` proves it. A layer that obeys the pattern
    already still does afterwards. Raises GateFailed as `permute_network` does.
    """
    require_finite({name: module.get_parameter(name) for name in names})
    network = TorchNetwork(module, sample, masks)
    work = _Work(network, pattern, names, max_cut, uncut or {}, dense or {})
    report, gathers = _ordered(work, gather, live_first=live_first, seed=seed)
    cut = [name for name in names if work.needed.get(name) and work.roads.get(name, "dense") != "dense"]
    document = _document(pattern, report, gathers, cut)
    return _fitted(work, report, gathers, document, _cut(module, pattern, document, masks))


def fit_graph(
    model: onnx.ModelProto,
    feeds: Sequence[Feeds],
    pattern: NMPattern,
    names: Sequence[str],
    *,
    sizes: Mapping[str, int] | None = None,
    gather: Gather = "input",
    dense: Mapping[str, str] | None = None,
    live_first: bool = False,
    seed: int = 0,
) -> tuple[onnx.ModelProto, Fitted]:
    """Permute the channels of an ONNX graph so that weights obey a pattern; nothing is cut.

    Args:
        model: it stays as it is.
        feeds: inputs that it takes, on which outputs before and after are compared.
        pattern: N:M.
        names: stored weights that are to obey it, if they can.
        sizes: an example of free sizes that the network takes.
        gather: as of `fit_pattern`, as are dense, live_first and seed.
        dense: weights that are to stay as they are, each with the reason.
        live_first: have channels that nobody reads last.
        seed: of the search.

    Returns:
        The graph, and what was done. Gathers are not in it yet.

    Raises:
        GateFailed: as `permute_graph`.
    """
    network = GraphNetwork(model, feeds, sizes or {})
    require_finite({name: network.weight(name).float() for name in names if name in network.tensors()})
    stored = [name for name in names if name in network.tensors()]
    work = _Work(network, pattern, stored, 0.0, {}, dense or {})
    report, gathers = _ordered(work, gather, live_first=live_first, seed=seed)
    return network.model, _fitted(work, report, gathers, _document(pattern, report, gathers, []), {})


def _ordered(
    work: _Work, gather: Gather, *, live_first: bool, seed: int
) -> tuple[PermutationReport, dict[str, Tensor]]:
    """Permute the network, and find the layers that need their input gathered, each with its order."""
    if not work.open:  # what satisfies the pattern already needs no order, and no channels are looked for
        none = Channels(spaces=())
        return PermutationReport(
            spaces=(), layers=(), record=record_of(none, {}), difference=0.0, untraced=""
        ), {}
    channels, pattern = work.network.channels, work.pattern
    search = _remembered(cutting=any(work.allowed.values()), live_first=live_first, seed=seed)
    chosen = _permutable(work, channels, search)
    report = work.network.permute(chosen, pattern, search)
    for name in chosen:
        work.found(name, "permuted", work.weight(name))
    gathers: dict[str, Tensor] = {}
    for name in work.network.gatherable(work.open, gather):
        order = search(_rows(work.weight(name), work.axis(name)), pattern)
        if work.found(name, "gathered", work.weight(name).index_select(work.axis(name), order)):
            gathers[name] = order
    _explain(work, channels, gather)
    return report, gathers


def _document(
    pattern: NMPattern, report: PermutationReport, gathers: Mapping[str, Tensor], cut: Sequence[str]
) -> dict[str, Any]:
    return {
        "version": 1,
        "pattern": str(pattern),
        "permutation": report.record,
        "gathers": {name: order.tolist() for name, order in gathers.items()},
        "cut": list(cut),
    }


def _fitted(
    work: _Work,
    report: PermutationReport,
    gathers: dict[str, Tensor],
    document: dict[str, Any],
    n_cut: Mapping[str, int],
) -> Fitted:
    return Fitted(
        layers=tuple(work.layer(name, n_cut.get(name, 0)) for name in work.names),
        gathers=gathers,
        document=document,
        difference=report.difference,
    )


def replay(module: nn.Module, document: Mapping[str, Any]) -> None:
    """Do to a fresh copy of the network, in place, what `fit_pattern` did.

    Raises ArtefactError for another document.
    """
    try:
        n, _, m = document["pattern"].partition(":")
        pattern = NMPattern(n=int(n), m=int(m))
        apply_record(module, document["permutation"])
        _cut(module, pattern, document, {})
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as cause:
        raise ArtefactError(
            f"The record of the permutation does not fit this network: {type(cause).__name__}: {cause}.",
            expected="The record that was written for it was expected.",
            do="Build the bundle again.",
        ) from cause


def _cut(
    module: nn.Module, pattern: NMPattern, document: Mapping[str, Any], masks: Mapping[str, Tensor]
) -> dict[str, int]:
    """Set to +0.0 what the pattern has no room for, in the weights that the document names; how many each
    lost.
    """
    n_cut = {}
    for name in document["cut"]:
        weight = module.get_parameter(name)
        axis = reduction_axis(module, name) or 0
        order = torch.tensor(document["gathers"].get(name) or range(weight.shape[axis]))
        kept = largest_per_group(weight.detach().index_select(axis, order), axis, pattern)
        kept = kept.index_select(axis, order.argsort())
        n_cut[name] = int(((weight != 0) & ~kept).sum())
        with torch.no_grad():
            weight.masked_fill_(~kept, 0.0)
            if name in masks:
                masks[name].logical_and_(kept)
    return n_cut


class _Work:
    """The weights in question, and what is known of each so far."""

    def __init__(
        self,
        network: Patterned,
        pattern: NMPattern,
        names: Sequence[str],
        max_cut: float,
        uncut: Mapping[str, str],
        dense: Mapping[str, str],
    ) -> None:
        self.network, self.pattern, self.names = network, pattern, tuple(names)
        self.uncut = uncut if max_cut else {}
        self.allowed = {name: 0.0 if name in uncut else max_cut for name in names}
        self.before = {name: network.weight(name).clone() for name in names}
        self.roads: dict[str, PatternMethod] = {}
        self.reasons: dict[str, str] = {}
        self.over: dict[str, int] = {}
        self.needed: dict[str, float] = {}
        for name in names:
            reason = dense.get(name) or network.excluded(name, pattern)
            if reason:
                self.reasons[name] = reason
            elif obeys(self.before[name], self.axis(name), pattern):
                self.roads[name] = "as trained"
                self.over[name], self.needed[name] = 0, 0.0
            else:
                least = least_cut_share(self.before[name], self.axis(name), pattern)
                if least > max_cut:
                    self.reasons[name] = (
                        f"no permutation satisfies {pattern} without dropping at least {_percent(least)} of sum |w|: {_NO_ROOM}"
                    )

    def why_uncut(self, name: str) -> str:
        """A clause that says why a weight may not be cut where others may, or nothing."""
        return f"; none of its weights may be dropped, since {self.uncut[name]}" if name in self.uncut else ""

    def weight(self, name: str) -> Tensor:
        """As it is in the network now."""
        return self.network.weight(name)

    def axis(self, name: str) -> int:
        return self.network.axis(name)

    @property
    def open(self) -> list[str]:
        """The weights that may still come to obey the pattern."""
        return [name for name in self.names if name not in self.roads and name not in self.reasons]

    def found(self, name: str, road: PatternMethod, ordered: Tensor) -> bool:
        """Note an order that was tried; True, and the road taken, when it needs no larger cut than is
        allowed.
        """
        needed = cut_share(ordered, self.axis(name), self.pattern)
        if needed <= self.needed.get(name, 1.0):
            self.needed[name] = needed
            self.over[name] = int(groups_over(ordered, self.axis(name), self.pattern))
        if needed > self.allowed[name]:
            return False
        if name not in self.roads:
            self.roads[name] = road
        return True

    def layer(self, name: str, n_cut: int) -> PatternLayer:
        weight, road = self.before[name], self.roads.get(name, "dense")
        grouped = not self.network.excluded(name, self.pattern)
        over = int(groups_over(weight, self.axis(name), self.pattern)) if grouped else None
        return PatternLayer(
            name=name,
            shape=tuple(weight.shape),
            density=float((weight != 0).double().mean()) if weight.numel() else 0.0,
            road=road,
            n_groups=weight.numel() // self.pattern.m if grouped else None,
            groups_over_before=over,
            groups_over_after=self.over.get(name),
            cut_needed=self.needed.get(name),
            cut=0.0 if road == "dense" else self.needed[name],
            n_cut=n_cut,
            reason=self.reasons.get(name, "") if road == "dense" else "",
        )


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _rows(weight: Tensor, axis: int) -> Tensor:
    """(R, I): a row for each output and kernel position."""
    return weight.detach().movedim(axis, -1).reshape(-1, weight.shape[axis])


def _remembered(*, cutting: bool, live_first: bool, seed: int) -> Callable[[Tensor, NMPattern], Tensor]:
    """The search, which does not search the same matrix twice."""
    known: dict[bytes, Tensor] = {}

    def search(weight_RI: Tensor, pattern: NMPattern) -> Tensor:
        content = weight_RI.detach().cpu().abs().contiguous()
        key = hashlib.sha256(repr(tuple(content.shape)).encode() + content.numpy().tobytes()).digest()
        if key not in known:
            known[key] = least_cutting_order(
                content, pattern, cutting=cutting, live_first=live_first, seed=seed
            )
        return known[key]

    return search


# Layers whose channels can be permuted


def _permutable(work: _Work, channels: Channels, search: Callable[[Tensor, NMPattern], Tensor]) -> list[str]:
    """The weights that obey the pattern when the channels of exactly these are permuted together.

    Layers that read the same channels have one order. When it is not good enough for all of them, the one
    that is furthest from it goes, and the others are tried again: one that cannot obey the pattern would only
    be in the way. One that obeys it already may not lose it, and never goes.
    """
    names = [name for name in work.open if _movable(work, channels, name)]
    holding = [name for name in work.names if work.roads.get(name) == "as trained"]
    moved = [name for name in holding if _movable(work, channels, name)]
    together = [{m.name for m in space.members if m.reads} for space in channels.free]
    axes = {name: work.axis(name) for name in (*names, *moved)}
    while names:
        layers = dict.fromkeys([*names, *moved], work.pattern)
        orders = preview(work.network.tensors(), axes, channels, layers, search)
        ordered = {name: reordered(work.weight(name), orders.get(name)) for name in [*names, *holding]}
        failing = {name for name in ordered if not _good_enough(work, name, ordered[name])}
        if not failing:
            return list(layers)
        gone = {_worst(work, readers & ordered.keys(), failing, ordered) for readers in together}
        if gone <= {None}:
            return []
        names = [name for name in names if name not in gone]
    return []


def _movable(work: _Work, channels: Channels, name: str) -> bool:
    return movable_weights(channels, name, work.weight(name), work.axis(name), work.pattern) > 0


def _good_enough(work: _Work, name: str, ordered: Tensor) -> bool:
    if work.roads.get(name) == "as trained":
        return obeys(ordered, work.axis(name), work.pattern)
    needed = cut_share(ordered, work.axis(name), work.pattern)
    if needed > work.allowed[name] and needed <= work.needed.get(name, 1.0):
        work.needed[name] = needed
        work.over[name] = int(groups_over(ordered, work.axis(name), work.pattern))
    return needed <= work.allowed[name]


def _worst(work: _Work, readers: set[str], failing: set[str], ordered: Mapping[str, Tensor]) -> str | None:
    """Of the layers that read one space, the one to go without: of those that fail, if any may, the furthest
    off.
    """
    if not readers & failing:
        return None
    droppable = [name for name in ordered if name in readers and name not in work.roads]
    candidates = [name for name in droppable if name in failing] or droppable
    return max(
        candidates, key=lambda name: cut_share(ordered[name], work.axis(name), work.pattern), default=None
    )


# Why the others stay


def _explain(work: _Work, channels: Channels, gather: Gather) -> None:
    for name in work.open:
        axis = work.axis(name)
        if name in work.needed:
            share = work.allowed[name]
            allowed = f", and at most {_percent(share)} may" if share else work.why_uncut(name)
            work.reasons[name] = (
                f"in the best order found {work.over[name]:,} groups are over the pattern, "
                f"which would drop {_percent(work.needed[name])} of sum |w|{allowed}"
            )
            continue
        if channels.untraced:
            reason = channels.untraced.rstrip(".")
        elif _movable(work, channels, name):
            reason = "its channels are permuted for other layers"
        else:
            reason = _why_pinned(channels, name, axis)
        work.reasons[name] = f"{reason}, and no gather was asked for" if gather == "none" else reason


def _why_pinned(channels: Channels, name: str, axis: int) -> str:
    for space in channels.spaces:
        for m in space.members:
            if m.name == name and m.axis == axis and m.reads:
                if m.slots.shape[1] > 1:
                    return f"each channel before it is {m.slots.shape[1]} of its columns, which only move together"
                if space.reason:
                    return f"its channels have to stay in order: {space.reason}"
    return "its channels have to stay in order"
