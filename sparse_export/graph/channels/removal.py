"""Which channels can be taken out of a graph: beside what belongs together, what holds channels and who reads them.

A trace of labels says which channels are one. Taking some out asks for more than another order does: every tensor
has to keep its form, so an operator has to be known to take fewer, and what is not told apart by a whole axis goes
together. It asks for less as well: channels need not be alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import torch
from torch import Tensor

from sparse_export.graph.channels import reasons
from sparse_export.graph.channels.graph_trace import (
    GraphTrace,
    Lost,
    Rule,
    Value,
    is_indifferent,
    settings_of,
)
from sparse_export.graph.channels.labels import Labels, Ledger
from sparse_export.graph.channels.onnx_graph import Array, Graph, Shape, captured, title
from sparse_export.graph.channels.parameters import Undecided

__all__ = ["Along", "Layer", "Removal", "Taker"]

REAL = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True, kw_only=True)
class Along:
    """The axis of a tensor that loses channels, and the slot of each of its entries, -1 for one that stays."""

    axis: int
    slots: Array


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A Conv, ConvTranspose, Gemm or MatMul that sums over the channels of its input.

    w_OIK: its weight as outputs, inputs, and whatever is summed over besides.  in_axis, out_axis: of the
    weight as it is stored.  scale: what the product is multiplied by.  reads_OI: whether an output channel
    has a weight other than zero for an input channel.  foldable: inputs whose contribution is known and the
    same everywhere in the output.  constant: of the inputs.  groups: 1, or the groups of a convolution, whose
    channels leave only as whole groups; then in_slots is empty.
    """

    node: onnx.NodeProto
    weight: str
    in_axis: int
    out_axis: int
    in_slots: Array
    out_slots: Array
    w_OIK: Array  # noqa: N815 - shape suffix
    reads_OI: Array  # noqa: N815 - shape suffix
    foldable: Array
    constant: Array
    scale: float = 1.0
    groups: int = 1

    def contribution(self, inputs: Array) -> Array:
        """Float64 (outputs,): what these constant inputs add. inputs: numbers of foldable ones."""
        inputs = inputs[self.constant[inputs] != 0]
        sums_OI = self.w_OIK[:, inputs].sum(axis=2, dtype=np.float64)
        added: Array = self.scale * (sums_OI @ self.constant[inputs])
        return added


class Removal(GraphTrace):
    """A trace of a graph that notes what can leave it.

    Attributes:
        graph: its constants as arrays.
        takers: by operator what says how a node takes fewer channels.
        values: by tensor name; a tensor that is not there has no channels.
        weights: by name and axis, the slots of an array's axis.
        layers: who sums over channels.
        sizes: of tensors, as far as they are known.
    """

    def __init__(
        self,
        graph: Graph,
        sizes: Mapping[str, Shape],
        rules: Mapping[str, Rule],
        takers: Mapping[str, Taker],
    ) -> None:
        weights = {node.input[1] for node in graph.nodes if node.op_type in _WEIGHTED and len(node.input) > 1}
        others = settings_of(graph.nodes)
        ledger = Ledger(
            {
                name: array.shape
                for name, array in graph.arrays.items()
                if array.dtype in REAL and array.size > 1 and name not in others
                if name in weights or not is_indifferent(array)
            },
            tells=False,
        )
        super().__init__(graph.model, ledger, {}, sizes, rules, graph.nodes, graph.arrays)
        self.graph, self.takers, self.sizes = graph, takers, dict(sizes)
        self.along: dict[str, Along] = {}
        self.weights: dict[tuple[str, int], Array] = {}
        self.layers: list[Layer] = []
        self._claims: dict[str, set[tuple[int, ...]]] = {}
        self._claimed: set[str] = set()

    # What is noted of each node

    def made_by(self, node: onnx.NodeProto, made: Sequence[Value], *, is_known: bool) -> Sequence[Value]:
        """Note what a node says of the channels. What takes no fewer keeps all that it reads and makes."""
        read = {*node.input, *captured(node)}
        found = [self.find(name) for name in read]
        if any(_has_channels(one) for one in (*found, *made)):
            taker = self.takers.get(node.op_type) if is_known else None
            taken = None if taker is None else taker(self, node, made)
            if taken is None:
                self._claimed = set()
                for one in (*found, *made):
                    if isinstance(one, Labels) and is_known:
                        self.ledger.pin(one.atoms, reasons.needs_all(title(node)))
            made = made if taken is None else taken
        for name, one in zip(node.output, made, strict=False):
            if not isinstance(one, Lost):
                self.sizes.setdefault(name, tuple(one.shape))
            if isinstance(one, Labels) and _has_channels(one):
                self.along[name] = self._along(one)
        for name in read & self.graph.arrays.keys() - self._claimed:
            self._claims.setdefault(name, set()).add(())  # read as a whole
        self._claimed = set()
        return made

    def run(self) -> None:
        """Walk the graph; say after it what its outputs need, and constants that are read in different ways."""
        super().run()
        for value in self.graph.model.graph.output:
            self._claims.setdefault(value.name, set()).add(())
        for name, claims in self._claims.items():
            if len(claims) > 1:
                for axis in {axis for claim in claims for axis in claim}:
                    self.pin(self.weights[name, axis], reasons.used_differently(name))

    def _along(self, labels: Labels) -> Along:
        """Of the axes that the channels may be found on, the one that keeps most of them apart."""
        long = labels.long
        if len(long) < 2:
            return Along(axis=long[0] if long else -1, slots=labels.atoms.reshape(-1).numpy())
        atoms = self.ledger.rooted(labels.atoms)
        best = max(long, key=lambda axis: (_n_apart(atoms, axis), atoms.shape[axis]))
        columns = labels.atoms.movedim(best, -1).reshape(-1, labels.shape[best])
        top = columns.amax(0)
        self.ledger.tie(columns, top)
        return Along(axis=best, slots=top.numpy())

    # What takers say

    def labels_of(self, node: onnx.NodeProto, at: int) -> Labels | None:
        """An input, None where it is absent or has no channels."""
        found = self.find(node.input[at]) if self.given(node, at) else None
        return found if isinstance(found, Labels) and _has_channels(found) else None

    def array(self, node: onnx.NodeProto, at: int) -> Array | None:
        """The constant that is an input of a node, None where it is absent or no constant."""
        return self.graph.arrays.get(node.input[at]) if at < len(node.input) else None

    def pin(self, slots: Array, reason: str) -> None:
        """Keep these slots."""
        self.ledger.pin(torch.from_numpy(np.asarray(slots)), reason)

    def tie(self, a: Array, b: Array) -> None:
        """These slots only go together."""
        self.ledger.tie(torch.from_numpy(a), torch.from_numpy(b))

    def slots(self, labels: Labels | None, axis: int, n: int, reason: str) -> Array:
        """The slots along an axis, those that stay as slots of their own. Channels along another axis are pinned."""
        found = np.full(n, -1)
        if labels is not None and all(one == axis for one in labels.long) and labels.shape[axis] == n:
            found = np.broadcast_to(labels.atoms.reshape(-1).numpy(), (n,)).copy()
        elif labels is not None:
            self.ledger.pin(labels.atoms, reason)
        stays = found < 0
        found[stays] = self.ledger.new_atoms(int(stays.sum())).numpy()
        self.pin(found[stays], reason)
        return found

    def claim(self, name: str, ties: Mapping[int, Array]) -> None:
        """Say that removing slots removes the entries of an array along these axes."""
        self._claims.setdefault(name, set()).add(tuple(sorted(ties)))
        self._claimed.add(name)
        for axis, slots in ties.items():
            self.tie(self.weights.setdefault((name, axis), slots), slots)


# How a node takes fewer channels: what it makes with the numbers that are known, None where it does not.
Taker = Callable[[Removal, onnx.NodeProto, Sequence[Value]], Sequence[Value] | None]


def with_numbers(labels: Labels, numbers: Array | None) -> Labels:
    """Labels of values of which some are known, in the atoms' shape."""
    if numbers is None or np.isnan(numbers).all():
        return replace(labels, numbers=None)
    return replace(labels, numbers=torch.from_numpy(np.ascontiguousarray(numbers, np.float64)))


def _has_channels(value: Value | Undecided | Lost) -> bool:
    return isinstance(value, Labels) and bool((value.atoms >= 0).any())


def _n_apart(atoms: Tensor, axis: int) -> int:
    """How many classes the places of an axis fall into when those that share an atom are one."""
    columns = atoms.movedim(axis, -1).reshape(-1, atoms.shape[axis])
    ledger = Ledger({}, tells=False)
    places = ledger.new_atoms(columns.shape[1])
    known, of_entry = columns.unique(return_inverse=True)
    ledger.tie(ledger.new_atoms(len(known))[of_entry], places.expand(columns.shape))
    return len(ledger.roots()[places].unique())
