"""Takes the channels that do nothing out of a graph, without changing what it computes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sparse_export.formats.bundle import CompactedLayer
from sparse_export.formats.layers import GraphLayer
from sparse_export.graph.channels import reasons
from sparse_export.graph.channels.onnx_graph import Array, Graph, attribute, captured, title
from sparse_export.graph.channels.removal import Along, Layer, Removal
from sparse_export.graph.channels.removal_rules import removal_of, slice_places, slice_range
from sparse_export.graph.layers import count_parameters, graph_layers
from sparse_export.graph.passes.gather_nodes import PICKING, picking

__all__ = ["Compacted", "compact", "with_gathers"]

# onnxruntime 1.31.1 on one core of an AMD EPYC with AVX-512, batch 256, 2026-11-25: a product takes 0.019 ns,
# an entry that is transposed, picked by row and transposed back 0.58 ns (in and out counted), an entry picked
# out of a row by itself 7 ns. So picking the live inputs pays when it saves thirty products an entry.
_PRODUCTS_PER_TRANSPOSED = 30
_PRODUCTS_PER_PICKED = 370
_PRODUCTS_PER_COPIED = 8

_UNFOLLOWED = ("its channels cannot be followed", "")  # why outputs and inputs stay


@dataclass(frozen=True, kw_only=True)
class Compacted:
    """A graph without its dead channels.

    layers: what became of each layer.  n_removed: output channels of layers that are gone; n_inputs_dropped:
    inputs of layers that are no longer read, though what comes before still makes them.  n_weights_before,
    n_weights_after: entries of all float constants.  kept: for the weights whose inputs had to stay together,
    by stored name, the numbers of the inputs that are left.  why_outputs: by node what keeps outputs without
    weights.
    """

    model: onnx.ModelProto
    layers: tuple[CompactedLayer, ...]
    n_removed: int
    n_inputs_dropped: int
    n_weights_before: int
    n_weights_after: int
    kept: dict[str, Array]
    why_outputs: dict[str, str]


def compact(
    model: onnx.ModelProto,
    *,
    inputs: bool = True,
    together: Mapping[str, Array] | None = None,
    unpicked: Collection[str] = (),
) -> Compacted:
    """Remove every channel whose absence changes nothing, again and again until none is left.

    A channel goes when nobody has a weight for it, or when it is the same number whatever the input is and
    all its readers can take that into their biases; and with it all that is tied to it, as by an addition. Of
    every tensor one channel stays at least. The graph's inputs and outputs keep their shapes.

    model: not changed; the very same graph comes back when nothing can go.  inputs: also leave out what a
    layer does not read of channels that have to stay, where picking the others costs less than it saves.
    together: by stored name of a weight a number for each of its input channels; those of one number leave
    together or not at all, so that groups of an N:M pattern stay whole.  unpicked: weights whose inputs that
    have to stay are not to be left out. Equal but for rounding, as long as no activation is infinite or NaN.
    Raises GateFailed when the sizes of the result do not fit, ArtefactError for a constant that is damaged or
    was not loaded; `require_same_output` compares what it computes.
    """
    graph = Graph.of(model)
    removal = removal_of(graph)
    whole = _Whole(together or {})
    changed = False
    while not (alive := _alive(removal, whole)).all():
        whole.remove(removal, alive)
        _remove(removal, alive)
        removal = removal_of(graph)
        changed = True
    why = _reasons(removal)
    dropped = _narrow(removal, whole, unpicked) if inputs else {}
    compacted = graph.assembled() if changed or dropped else model
    before = _with_weights(model)
    after = before if compacted is model else _with_weights(compacted)
    return Compacted(
        model=compacted,
        layers=_layers(before, after, why, dropped),
        n_removed=_n_outputs(before) - _n_outputs(after),
        n_inputs_dropped=sum(dropped.values()),
        n_weights_before=count_parameters(model)[0],
        n_weights_after=count_parameters(compacted)[0],
        kept=whole.kept,
        why_outputs={layer.node: why.get(layer.node, _UNFOLLOWED)[0] for layer in before},
    )


def with_gathers(found: Compacted, model: onnx.ModelProto, groups: Mapping[str, int]) -> Compacted:
    """The same facts once some weights have their inputs in another order, without groups at its end.

    model: the graph that came of `found.model`.  groups: by stored name of such a weight, how many
    consecutive inputs leave it together.
    """
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.name in groups}
    old = {layer.node: layer for layer in _with_weights(found.model)}
    rows = {row.node: row for row in found.layers}
    n_dropped = found.n_inputs_dropped
    for layer in _with_weights(model):
        if layer.weight not in groups:
            continue
        axis = layer.reduction_axis
        n_dropped += old[layer.node].shape[axis] - layer.shape[axis]
        used = np.moveaxis(arrays[layer.weight], axis, 0).reshape(layer.shape[axis], -1).any(axis=1)
        n_unread = int(np.count_nonzero(~used))
        inputs = ""
        if n_unread:
            told = f"{n_unread} input{'' if n_unread == 1 else 's'} not read"
            inputs = f"{told}: only whole groups of {groups[layer.weight]} at the end of its order go"
        why = _joined(found.why_outputs.get(layer.node, ""), inputs)
        rows[layer.node] = replace(rows[layer.node], after=layer.shape, why=why)
    return replace(
        found,
        model=model,
        layers=tuple(rows.values()),
        n_inputs_dropped=n_dropped,
        n_weights_after=count_parameters(model)[0],
    )


class _Whole:
    """Which inputs of which weights leave together, as the weights become smaller.

    kept: the numbers that the inputs left had at first.  numbers: those that tell what belongs together.
    """

    def __init__(self, together: Mapping[str, Array]) -> None:
        self.numbers = {name: np.asarray(numbers) for name, numbers in together.items()}
        self.kept = {name: np.arange(len(numbers)) for name, numbers in self.numbers.items()}

    def widened(self, weight: str, chosen: Array) -> Array:
        """Chosen inputs, bool, and all that belong to them."""
        numbers = self.numbers.get(weight)
        if numbers is None or len(numbers) != len(chosen):
            return chosen
        wide: Array = np.isin(numbers, numbers[chosen])
        return wide

    def remove(self, removal: Removal, alive: Array) -> None:
        """Follow the removal of all slots that are not alive."""
        done = set()
        for layer in removal.layers:
            name = layer.weight
            if name in self.numbers and name not in done and len(layer.in_slots) == len(self.numbers[name]):
                left = alive[layer.in_slots]
                self.numbers[name], self.kept[name] = self.numbers[name][left], self.kept[name][left]
                done.add(name)

    def keep(self, weight: str, chosen: Array) -> None:
        """Note that of the inputs of a weight only some are still read."""
        if weight in self.numbers:
            self.numbers[weight], self.kept[weight] = self.numbers[weight][chosen], self.kept[weight][chosen]


def _labels(removal: Removal) -> tuple[int, Array]:
    """How many classes of slots there are that only go together, and the class of each slot."""
    roots, labels = removal.ledger.roots().unique(return_inverse=True)
    return len(roots), labels.numpy()


def _alive(removal: Removal, whole: _Whole) -> Array:
    """Which slots have to stay, bool (n_slots,)."""
    n_classes, labels = _labels(removal)
    alive = np.zeros(n_classes, np.bool_)
    for slots, _ in removal.ledger.pins:
        alive[labels[slots.numpy()]] = True
    values = [labels[one.slots] for one in removal.along.values() if (one.slots >= 0).all()]
    while True:
        _spread(removal.layers, labels, alive)
        if _complete(removal.layers, labels, alive, whole):
            continue
        emptied = next((classes for classes in values if not alive[classes].any()), None)
        if emptied is None:
            slots_alive: Array = alive[labels]
            return slots_alive
        alive[emptied[0]] = True


def _complete(layers: list[Layer], labels: Array, alive: Array, whole: _Whole) -> bool:
    """Make alive, in place, what belongs to inputs that are; was there any?"""
    n_alive = np.count_nonzero(alive)
    for layer in layers:
        if len(layer.in_slots):
            inputs = labels[layer.in_slots]
            alive[inputs[whole.widened(layer.weight, alive[inputs])]] = True
    return bool(np.count_nonzero(alive) > n_alive)


def _spread(layers: list[Layer], labels: Array, alive: Array) -> None:
    """Make alive, in place, what an output that is alive reads and cannot know beforehand."""
    while True:
        n_alive = np.count_nonzero(alive)
        for layer in reversed(layers):
            if len(layer.in_slots):
                outputs = alive[labels[layer.out_slots]]
                needed = layer.reads_OI[outputs].any(axis=0) & ~layer.foldable
                alive[labels[layer.in_slots[needed]]] = True
        if np.count_nonzero(alive) == n_alive:
            return


def _remove(removal: Removal, alive: Array) -> None:
    """Cut every dead slot out of the nodes and arrays of the graph, in place."""
    graph = removal.graph
    for layer in removal.layers:
        if len(layer.in_slots):
            gone = np.flatnonzero(~alive[layer.in_slots] & layer.foldable)
            _fold(removal, layer, layer.contribution(gone))
        if layer.groups > 1:
            n_left = np.count_nonzero(alive[layer.out_slots]) // (len(layer.out_slots) // layer.groups)
            _set_attribute(layer.node, "group", int(n_left))
    for node in list(graph.nodes):
        if node.op_type == "Reshape":
            _resize_reshape(removal, node, alive)
        elif node.op_type == "Split":
            _resize_split(removal, node, alive)
        elif node.op_type == "Slice":
            _resize_slice(removal, node, alive)
    for (name, axis), slots in removal.weights.items():
        graph.arrays[name] = np.compress(alive[slots], graph.arrays[name], axis=axis)


def _set_attribute(node: onnx.NodeProto, name: str, value: float) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def _fold(removal: Removal, layer: Layer, added: Array) -> None:
    """Add to the bias of a layer, float64 (outputs,), the bias being made or made private where need be."""
    if not added.any():
        return
    graph, node = removal.graph, layer.node
    kind = graph.arrays[layer.weight].dtype
    if node.op_type == "MatMul":
        _add_after(removal, layer, (added + 0.0).astype(kind))
        return
    old = graph.arrays[node.input[2]] if removal.given(node, 2) else np.zeros(1, kind)
    old = old.astype(np.float64)
    if node.op_type == "Gemm":
        old = old * attribute(node, "beta", 1.0)
        _set_attribute(node, "beta", 1.0)
    name = graph.fresh_name(node.input[2] if removal.given(node, 2) else f"{layer.weight}_bias")
    graph.arrays[name] = (old.reshape(-1) + added + 0.0).astype(kind)
    del node.input[2:]
    node.input.append(name)
    removal.weights[name, 0] = layer.out_slots


def _add_after(removal: Removal, layer: Layer, added: Array) -> None:
    """A MatMul has no bias: put an addition behind it, which runtimes merge with one that is there."""
    graph, node = removal.graph, layer.node
    output = node.output[0]
    node.name = node.name or output
    node.output[0] = graph.fresh_name(output)
    name = graph.fresh_name(f"{layer.weight}_bias")
    graph.arrays[name] = added
    removal.weights[name, 0] = layer.out_slots
    place = next(i for i, other in enumerate(graph.nodes) if other is node) + 1
    graph.nodes.insert(place, helper.make_node("Add", [node.output[0], name], [output], name=name))


def _own(removal: Removal, node: onnx.NodeProto, index: int, values: list[int]) -> None:
    """Give a node a constant of its own in place of one that others may share."""
    while len(node.input) <= index:
        node.input.append("")
    old = node.input[index]
    name = removal.graph.fresh_name(old or f"{node.output[0]}_sizes")
    removal.graph.arrays[name] = np.array(values, np.int64)
    node.input[index] = name


def _stays(along: Along | None, alive: Array) -> Array | None:
    """Of the entries along a tensor's channels, which stay; None where all do."""
    if along is None or along.axis < 0:
        return None
    found: Array = (along.slots < 0) | alive[along.slots]
    return None if found.all() else found


def _resize_reshape(removal: Removal, node: onnx.NodeProto, alive: Array) -> None:
    along = removal.along.get(node.output[0])
    stays = _stays(along, alive)
    if along is None or stays is None:
        return
    sizes = [int(n) for n in removal.graph.arrays[node.input[1]]]
    if sizes[along.axis] != -1:
        sizes[along.axis] = int(np.count_nonzero(stays))
        _own(removal, node, 1, sizes)


def _resize_split(removal: Removal, node: onnx.NodeProto, alive: Array) -> None:
    whole = removal.along.get(node.input[0])
    stays = _stays(whole, alive)
    rank = len(removal.sizes[node.input[0]])
    if whole is None or stays is None or attribute(node, "axis", 0) % rank != whole.axis:
        return
    ends = np.cumsum([removal.sizes[name][whole.axis] for name in node.output])[:-1]
    sizes = [int(np.count_nonzero(part)) for part in np.split(stays, ends)]
    kept = [a for a in node.attribute if a.name != "num_outputs"]
    del node.attribute[:]
    node.attribute.extend(kept)
    _own(removal, node, 1, sizes)


def _resize_slice(removal: Removal, node: onnx.NodeProto, alive: Array) -> None:
    whole = removal.along.get(node.input[0])
    stays = _stays(whole, alive)
    if whole is None or stays is None:
        return
    found = slice_range(removal, node, whole.axis, len(stays))
    starts, ends = removal.array(node, 1), removal.array(node, 2)
    if found is None or starts is None or ends is None:
        return
    places = slice_places(removal, node, len(removal.sizes[node.input[0]]), len(starts))
    if places is None or whole.axis not in places:
        return
    at = places.index(whole.axis)
    start = int(np.count_nonzero(stays[: found[0]]))
    end = start + int(np.count_nonzero(stays[found[0] : found[1]]))
    _own(removal, node, 1, [*map(int, starts[:at]), start, *map(int, starts[at + 1 :])])
    _own(removal, node, 2, [*map(int, ends[:at]), end, *map(int, ends[at + 1 :])])


# -- inputs that stay, and are not read


def _narrow(removal: Removal, whole: _Whole, unpicked: Collection[str]) -> dict[str, int]:
    """Put before each layer a choice of the channels that it reads, where that pays; how many it leaves
    out.
    """
    graph, n_dropped = removal.graph, {}
    n_readers = Counter(name for node in graph.nodes for name in {*node.input, *captured(node)})
    for layer in removal.layers:
        if not len(layer.in_slots) or n_readers[layer.weight] > 1 or layer.weight in unpicked:
            continue
        needed = layer.reads_OI.any(axis=0) & ~layer.foldable
        if not needed.any():
            needed[0] = True
        needed = whole.widened(layer.weight, needed)
        if needed.all() or not _pays(removal, layer, int(np.count_nonzero(needed))):
            continue
        gone = np.flatnonzero(~needed)
        _fold(removal, layer, layer.contribution(gone[layer.foldable[gone]]))
        _pick(removal, layer, np.flatnonzero(needed))
        graph.arrays[layer.weight] = np.compress(needed, graph.arrays[layer.weight], axis=layer.in_axis)
        whole.keep(layer.weight, needed)
        n_dropped[_key(layer.node)] = len(gone)
    return n_dropped


def _pays(removal: Removal, layer: Layer, n_needed: int) -> bool:
    n_out, n_in = layer.reads_OI.shape
    if layer.node.op_type in ("Gemm", "MatMul"):
        return bool((n_in - n_needed) * n_out > _PRODUCTS_PER_TRANSPOSED * (n_in + n_needed))
    before, after = (removal.sizes.get(name) for name in (layer.node.input[0], layer.node.output[0]))
    if before is None or after is None or layer.node.op_type != "Conv":
        return False
    # Sizes of pictures, also free ones, are alike before and after: only their ratio counts then.
    saved = (n_in - n_needed) * n_out * layer.w_OIK.shape[2] * math.prod(after[2:])
    return bool(saved > n_needed * (_PRODUCTS_PER_PICKED + _PRODUCTS_PER_COPIED * math.prod(before[2:])))


def _pick(removal: Removal, layer: Layer, needed: Array) -> None:
    graph, node = removal.graph, layer.node
    source = node.input[0]
    place = next(i for i, other in enumerate(graph.nodes) if other is node)
    index = graph.fresh_name(f"{source}_live_{place}")
    graph.arrays[index] = needed.astype(np.int64)
    axis = 1 if node.op_type == "Conv" else -1
    names = [graph.fresh_name(f"{source}_{step}_{place}") for step in PICKING]
    added = picking(source, index, axis=axis, rank=len(removal.sizes[source]), names=names)
    node.input[0] = added[-1].output[0]
    graph.nodes[place:place] = added


# -- the result


def _with_weights(model: onnx.ModelProto) -> list[GraphLayer]:
    """The layers that multiply by a constant; products of two activations have no channel of their own to
    lose.
    """
    return [layer for layer in graph_layers(model) if layer.constant]


def _n_outputs(layers: Sequence[GraphLayer]) -> int:
    return sum(_sizes(layer.shape, layer.op_type, layer.reduction_axis) for layer in layers)


def _sizes(shape: tuple[int, ...], op_type: str, reduction_axis: int) -> int:
    if op_type == "Conv":
        return shape[0]
    return shape[1 - reduction_axis] if len(shape) == 2 or op_type == "ConvTranspose" else 0


def _layers(
    before: Sequence[GraphLayer],
    after: Sequence[GraphLayer],
    why: dict[str, tuple[str, str]],
    dropped: dict[str, int],
) -> tuple[CompactedLayer, ...]:
    left = {layer.node: layer for layer in after}
    result = []
    for layer in before:
        outputs, inputs = why.get(layer.node, _UNFOLLOWED)
        found = left.get(layer.node, layer)
        if layer.node in dropped:
            inputs = ""
        result.append(
            CompactedLayer(
                node=layer.node,
                weight=layer.weight,
                before=layer.shape,
                after=found.shape,
                why=_joined(outputs, inputs),
            )
        )
    return tuple(result)


def _joined(outputs: str, inputs: str) -> str:
    return "; ".join(text for text in (outputs, inputs) if text) or "every channel left has weights"


def _key(node: onnx.NodeProto) -> str:
    """What `graph_layers` calls a node."""
    return node.name or node.output[0]


def _reasons(removal: Removal) -> dict[str, tuple[str, str]]:
    """By node what keeps outputs that have no weight, and inputs that no weight is for; empty for nothing."""
    _, labels = _labels(removal)
    blockers = _blockers(removal, labels)
    found = {}
    for layer in removal.layers:
        empty = layer.out_slots[~layer.reads_OI.any(axis=1)]
        unread = layer.in_slots[~layer.reads_OI.any(axis=0)] if len(layer.in_slots) else layer.in_slots
        found[_key(layer.node)] = (
            _told(empty, "output", "without weights", labels, blockers),
            _told(unread, "input", "not read", labels, blockers),
        )
    return found


def _told(slots: Array, what: str, how: str, labels: Array, blockers: dict[int, str]) -> str:
    counts = Counter(blockers.get(int(labels[slot]), reasons.LAST_CHANNEL) for slot in slots)
    return "; ".join(
        f"{n} {what}{'' if n == 1 else 's'} {how}: {reason}" for reason, n in counts.most_common()
    )


def _blockers(removal: Removal, labels: Array) -> dict[int, str]:
    """By class why it cannot go."""
    found: dict[int, str] = {}
    for layer in removal.layers:
        if len(layer.in_slots):
            reads = layer.reads_OI.any(axis=0) & ~layer.foldable
            for slot, constant in zip(layer.in_slots[reads], layer.constant[reads], strict=True):
                text = reasons.read_on(title(layer.node))
                if np.isfinite(constant):
                    text = reasons.border_differs(title(layer.node))
                found.setdefault(int(labels[slot]), text)
    for pinned, reason in removal.ledger.pins:
        for slot in pinned.tolist():
            found.setdefault(int(labels[slot]), reason)
    return found
