"""The order in which a graph is walked: segments of nodes between the weights that are calibrated.

A weight is calibrated on what pruned weights before it give. So the nodes that need no weight but pruned ones
are run, over all batches; then those weights are pruned whose inputs are now known; and so on. Each node is
run once for a batch. Weights that read one value, or do not depend on each other, share a segment.

The one exception are weights that are used several times, one use after the other, as in a network that
repeats a layer: the later inputs depend on the weight itself. They are calibrated on a preview, for which the
nodes up to the last use are run with the weights as they are then.

Nodes that depend on nothing but stored tensors belong to every segment that needs them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

from sparse_export.oneshot.wiring import Wiring

__all__ = ["Segment", "Stop", "plan_following", "plan_segments", "segment_for"]


@dataclass(frozen=True, kw_only=True)
class Stop:
    """A weight as the walk sees it.

    Attributes:
        nodes: that multiply by it.
        values: what they multiply it by.
        size: of its statistics, in numbers.
        shares: what these are of; weights for which it is equal have them in common.
    """

    nodes: frozenset[int]
    values: tuple[str, ...]
    size: int = 0
    shares: Hashable = None


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Nodes that are run together for every batch.

    Attributes:
        nodes: ascending, with the constant ones that they need; none where all values are there already.
        reads: values that come from segments before, or are inputs of the graph.
        fetches: values that it makes for others: weights that are calibrated after it, and later segments.
        keeps: those of them that later segments or weights read.
        drops: values of segments before that nobody reads after this one.
        stops: indices of the weights that are calibrated after it.
        preview: its nodes are run again later, so that nothing of it is kept.
    """

    nodes: tuple[int, ...]
    reads: tuple[str, ...]
    fetches: tuple[str, ...]
    keeps: tuple[str, ...]
    drops: tuple[str, ...]
    stops: tuple[int, ...]
    preview: bool = False


def plan_segments(
    wiring: Wiring, stops: Sequence[Stop], *, to_outputs: bool = False, most: int | None = None
) -> tuple[Segment, ...]:
    """Divide the nodes that calibration needs into segments.

    Args:
        wiring: of the graph.
        stops: the weights.
        to_outputs: walk on to the outputs of the graph; otherwise what no weight hangs on is not run.
        most: bound of the sum of the sizes of weights that share a segment; one alone may be above it.
    """
    return _Planner(wiring, stops, most).plan(wiring.outputs if to_outputs else ())


def plan_following(wiring: Wiring, values: Sequence[Sequence[str]]) -> tuple[Segment, ...]:
    """Divide the nodes of a graph in which nothing changes, so that a walk over it can go beside another.

    Args:
        wiring: of the graph.
        values: that each segment has to give; those of none have no nodes.
    """
    stops = [Stop(nodes=frozenset(), values=tuple(names)) for names in values]
    planner = _Planner(wiring, stops, None)
    segments = [planner.segment([index]) for index in range(len(stops))]
    return _with_lifetimes(segments, stops, wiring, ())


def segment_for(wiring: Wiring, value: str) -> Segment:
    """All that has to be run for one value, as a segment that keeps nothing."""
    (segment,) = _Planner(wiring, [], None).plan([value])
    return segment


class _Planner:
    """How far the walk is, while it is planned."""

    def __init__(self, wiring: Wiring, stops: Sequence[Stop], most: int | None) -> None:
        self.wiring, self.stops, self.most = wiring, stops, most
        self.constant = wiring.constant_beside(node for stop in stops for node in stop.nodes)
        self.pending = dict.fromkeys(range(len(stops)))
        self.done: set[int] = set()  # nodes of segments
        self.readers: dict[str, list[int]] = {}
        for node, names in enumerate(wiring.reads):
            for name in names:
                self.readers.setdefault(name, []).append(node)
        # A node can run when its makers can and its weights are pruned: how many of these are missing.
        self.missing = {
            node: len({*self._makers(node)}) for node in range(len(wiring.reads)) if node not in self.constant
        }
        for stop in stops:
            for node in stop.nodes:
                self.missing[node] += 1
        self.can_run: set[int] = set()
        self._release(node for node, count in self.missing.items() if count == 0)

    def plan(self, targets: Sequence[str]) -> tuple[Segment, ...]:
        segments = []
        while self.pending:
            ready = [index for index in self.pending if all(map(self._is_known, self.stops[index].values))]
            chosen = self._bounded(ready) or [min(self.pending, key=lambda i: min(self.stops[i].nodes))]
            segments.append(self.segment(chosen, preview=not ready))
            for index in chosen:
                del self.pending[index]
                for node in self.stops[index].nodes:
                    self.missing[node] -= 1
                    self._release([node] if self.missing[node] == 0 else [])
        if targets:
            segments.append(self.segment([], targets=targets))
        return _with_lifetimes(segments, self.stops, self.wiring, targets)

    def _makers(self, node: int) -> Iterable[int]:
        makers = (self.wiring.makers.get(name) for name in self.wiring.reads[node])
        return (maker for maker in makers if maker is not None and maker not in self.constant)

    def _release(self, nodes: Iterable[int]) -> None:
        stack = list(nodes)
        while stack:
            node = stack.pop()
            self.can_run.add(node)
            for after in {after for name in self.wiring.makes[node] for after in self.readers.get(name, ())}:
                if after in self.missing:
                    self.missing[after] -= 1
                    if self.missing[after] == 0:
                        stack.append(after)

    def _is_known(self, name: str) -> bool:
        maker = self.wiring.makers.get(name)
        return maker is None or maker in self.constant or maker in self.can_run

    def _bounded(self, ready: Sequence[int]) -> list[int]:
        """As many of the weights as may share a segment; shared statistics count once."""
        chosen: list[int] = []
        sizes: dict[Hashable, int] = {}
        for index in ready:
            stop = self.stops[index]
            larger = sizes | {index if stop.shares is None else stop.shares: stop.size}
            if chosen and self.most is not None and sum(larger.values()) > self.most:
                break
            sizes = larger
            chosen.append(index)
        return chosen

    def segment(
        self, chosen: Sequence[int], *, preview: bool = False, targets: Sequence[str] = ()
    ) -> Segment:
        wanted = dict.fromkeys([*(name for i in chosen for name in self.stops[i].values), *targets])
        nodes = self._needed(wanted)
        if not preview:
            self.done |= nodes
            nodes |= self._sizes_of(nodes)
            self.done |= nodes
        made = {name for node in nodes for name in self.wiring.makes[node]}
        constants = self._constants([*(n for node in nodes for n in self.wiring.reads[node]), *wanted])
        known = {name for node in constants for name in self.wiring.makes[node]}
        reads = {name for node in nodes for name in self.wiring.reads[node]}
        return Segment(
            nodes=tuple(sorted(nodes | constants)),
            reads=tuple(sorted(reads - made - known - self.wiring.stored)),
            # Later readers of what it makes are added when all segments are known.
            fetches=tuple(name for name in wanted if name in made or name in known),
            keeps=(),
            drops=(),
            stops=tuple(chosen),
            preview=preview,
        )

    def _needed(self, names: Iterable[str]) -> set[int]:
        """The nodes that are still to run to make values; not the constant ones."""
        found: set[int] = set()
        stack = list(names)
        while stack:
            node = self.wiring.makers.get(stack.pop())
            if node is not None and node not in self.done and node not in self.constant and node not in found:
                found.add(node)
                stack += self.wiring.reads[node]
        return found

    def _constants(self, names: Iterable[str]) -> set[int]:
        found: set[int] = set()
        stack = list(names)
        while stack:
            node = self.wiring.makers.get(stack.pop())
            if node in self.constant and node is not None and node not in found:
                found.add(node)
                stack += self.wiring.reads[node]
        return found

    def _sizes_of(self, nodes: Iterable[int]) -> set[int]:
        """Nodes that read only the sizes of what these make, so that it need not be kept for them."""
        names = {name for node in nodes for name in self.wiring.makes[node]}
        after = {node for name in names for node in self.readers.get(name, ())}
        return {node for node in after & self.wiring.sizes if node not in self.done}


def _with_lifetimes(
    segments: Sequence[Segment], stops: Sequence[Stop], wiring: Wiring, targets: Sequence[str]
) -> tuple[Segment, ...]:
    """Note for each segment what later ones read of it, and what nobody reads after it."""
    owner = {
        name: index
        for index, segment in enumerate(segments)
        if not segment.preview
        for node in segment.nodes
        for name in wiring.makes[node]
    }
    last: dict[str, int] = {}
    for index, segment in enumerate(segments):
        calibrated = {name for stop in segment.stops for name in stops[stop].values}
        for name in (*segment.reads, *(calibrated - set(segment.fetches))):
            last[name] = index
    last |= dict.fromkeys(targets, len(segments) - 1)
    keeps: list[list[str]] = [[] for _ in segments]
    drops: list[list[str]] = [[] for _ in segments]
    for name, at in last.items():
        if owner.get(name, at) < at:
            keeps[owner[name]].append(name)
            drops[at].append(name)
    return tuple(
        replace(
            segment,
            fetches=tuple(dict.fromkeys([*segment.fetches, *keeps[index]])),
            keeps=tuple(keeps[index]),
            drops=tuple(drops[index]),
        )
        for index, segment in enumerate(segments)
    )
