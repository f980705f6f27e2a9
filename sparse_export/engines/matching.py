"""Matches the layers of two engines of one graph that do the same work.

Engines of one graph need not have the same layers: each fuses nodes as its kernels allow, and puts reformats
between them ("Reformatting CopyNode for Input Tensor 0 to conv1 + relu1", NVIDIA/TensorRT issues 1293, 2136,
3842). So layers are grouped by the nodes of the graph that they execute, until neither engine has a node in
two groups.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from sparse_export.engines.tactics import Kernels, parts_of_name

__all__ = ["LayerGroup", "match_layers"]

_REFORMAT = re.compile(r"Reformatting CopyNode for (?:Input|Output) Tensor \d+ (?:to|from|for) (?P<name>.*)")
# Myelin, the compiler within TensorRT, numbers its kernels: one name may mean different kernels in two
# engines.
_NUMBERED = re.compile(r"__my[el]")


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """The same work in two engines.

    Attributes:
        nodes: of the graph, sorted.
        dense: layers of the engine without sparse kernels, in its order.
        sparse: layers of the other, in its order.
    """

    nodes: tuple[str, ...]
    dense: tuple[str, ...]
    sparse: tuple[str, ...]


def match_layers(
    dense: Sequence[str],
    sparse: Sequence[str],
    *,
    dense_kernels: Iterable[Kernels],
    sparse_kernels: Iterable[Kernels],
    nodes: Collection[str],
) -> tuple[LayerGroup, ...]:
    """Group the layers of two engines by the work that they do.

    A layer with no node of the graph is matched by its name, unless that is only a number; a reformat goes
    with the layer whose kernel needs it.

    Args:
        dense: layer names of the engine without sparse kernels, as the profiler gives them, each once.
        sparse: layer names of the other engine, likewise.
        dense_kernels: of the first engine.
        sparse_kernels: of the second.
        nodes: names of all nodes of the graph.

    Returns:
        The groups in the order of the sparse engine, then those that only the dense one has.
    """
    known = set(nodes)
    layers = [
        *(("sparse", name, _keys(name, known, _by_layer(sparse_kernels), "sparse")) for name in sparse),
        *(("dense", name, _keys(name, known, _by_layer(dense_kernels), "dense")) for name in dense),
    ]
    leader: dict[str, str] = {}

    def lead(key: str) -> str:
        while leader.setdefault(key, key) != key:
            key = leader[key]
        return key

    for _, _, keys in layers:
        first, *rest = sorted(keys)
        for key in rest:
            leader[lead(key)] = lead(first)
    groups: dict[str, dict[str, list[str]]] = {}
    for side, name, keys in layers:
        group = groups.setdefault(lead(min(keys)), {"dense": [], "sparse": [], "nodes": []})
        group[side].append(name)
        group["nodes"] += [key.removeprefix("node ") for key in keys if key.startswith("node ")]
    return tuple(
        LayerGroup(
            nodes=tuple(sorted(set(group["nodes"]))),
            dense=tuple(group["dense"]),
            sparse=tuple(group["sparse"]),
        )
        for group in groups.values()
    )


def _by_layer(kernels: Iterable[Kernels]) -> dict[str, set[str]]:
    """The nodes of each layer, by its name."""
    found: dict[str, set[str]] = {}
    for one in kernels:
        found.setdefault(one.layer, set()).update(one.nodes)
    return found


def _keys(name: str, known: set[str], by_layer: dict[str, set[str]], side: str) -> frozenset[str]:
    """What a layer is grouped by: `node NAME`, or `layer NAME` where no node of the graph is known."""
    reformat = _REFORMAT.fullmatch(name)
    base = name if reformat is None else reformat["name"]
    nodes = {*by_layer.get(name, ()), *by_layer.get(base, ()), *parts_of_name(base)} & known
    if nodes:
        return frozenset(f"node {node}" for node in nodes)
    return frozenset({f"layer of {side}: {name}" if _NUMBERED.match(name) else f"layer {name}"})
