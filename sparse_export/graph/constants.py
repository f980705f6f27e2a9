"""The constants of a graph, evaluated: also those that nodes compute before a layer multiplies by them."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from sparse_export.graph.evaluation_limits import (
    MAX_NODES,
    MAX_WORK,
    WORK_OF_A_STEP,
    WORK_PER_BYTE,
    NotEvaluatedError,
)
from sparse_export.graph.node_values import computed
from sparse_export.graph.nodes import ONNX_DOMAINS, is_standard, permutation
from sparse_export.graph.output_sizes import BROADCAST, NO_LARGER, has_known_size
from sparse_export.graph.scopes import Scope
from sparse_export.graph.stored_tensors import Read, Stored
from sparse_export.graph.weight_steps import Step, main_input, step_of
from sparse_export.signature import Array

_MEASURED = 4  # times that the values of a weight are gone through once it is known
_KEPT_BYTES = 2**26  # of weights, for layers that share them


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A value that depends on no input.

    Attributes:
        values: evaluated.
        stored: name of the stored tensor that it is computed from.
        steps: the nodes between, from the layer up to the stored tensor.
        sparse: is the tensor stored sparse?
        overridable: can the caller replace something that it is computed from?
        measured: what was counted in the values, for layers that share them.
    """

    values: Array
    stored: str
    steps: tuple[Step, ...]
    sparse: bool
    overridable: bool
    measured: dict[object, Any] = field(default_factory=dict, compare=False, repr=False)

    def stored_axis(self, axis: int) -> int | None:
        """Follow an axis of the value back to the stored tensor.

        Args:
            axis: of the value.

        Returns:
            The axis of the stored tensor; None where a node between moves entries otherwise than a Transpose.
        """
        for step in self.steps:
            if step.node.op_type == "Transpose":
                axis = permutation(step.node, len(step.shape))[axis]
            elif step.shape != step.after or step.node.op_type not in NO_LARGER | BROADCAST:
                return None
        return axis


@dataclass(frozen=True, kw_only=True)
class Unevaluated:
    """A constant that is not evaluated.

    Attributes:
        why: the rest of a sentence that begins with the weight.
    """

    why: str


Key = tuple[Scope, str]


class Evaluator:
    """Evaluates the constants of one graph, within a limit that grows with the bytes that the graph stores.

    Without the limit a small file could ask for hours.

    Args:
        model: the graph's.
        read: gives the values of a stored tensor.
    """

    def __init__(self, model: onnx.ModelProto, read: Read) -> None:
        self._read = read
        self._opset = next((entry.version for entry in model.opset_import if entry.domain in ONNX_DOMAINS), 1)
        stored = (*model.graph.initializer, *model.graph.sparse_initializer)
        self._most = MAX_WORK + WORK_PER_BYTE * sum(map(_n_stored, stored))
        self._done = 0
        self._kept: OrderedDict[Key, Constant | Unevaluated] = OrderedDict()
        self._kept_bytes = 0

    def evaluate(self, scope: Scope, name: str) -> Constant | Unevaluated:
        """Evaluate a constant.

        Args:
            scope: of the graph that uses it.
            name: of a value for which `scope.is_constant` is true.

        Returns:
            Its values; or the reason why they are not evaluated.

        Raises:
            ArtefactError: a stored tensor or a node is invalid.
        """
        found = scope.find(name)
        assert found is not None, "a constant comes from somewhere"
        key = (found[0], name)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        worked_out: Constant | Unevaluated
        try:
            with np.errstate(all="ignore"):  # NaN and overflow are findings about a weight, not about us
                worked_out = self._evaluate(scope, name)
        except NotEvaluatedError as cause:
            worked_out = Unevaluated(why=str(cause))
        self._keep(key, worked_out)
        return worked_out

    def _keep(self, key: Key, worked_out: Constant | Unevaluated) -> None:
        self._kept[key] = worked_out
        self._kept_bytes += _n_bytes(worked_out)
        while self._kept_bytes > _KEPT_BYTES:
            self._kept_bytes -= _n_bytes(self._kept.popitem(last=False)[1])

    def _spend(self, n_values: int) -> None:
        """Count work before it is done."""
        self._done += n_values
        if self._done > self._most:
            raise NotEvaluatedError(
                f"is computed, and the weights of the graph take more than {self._most:,} values to work out, "
                "of which none is stored"
            )

    def _evaluate(self, scope: Scope, name: str) -> Constant:
        order = _sources(scope, name, self._spend)
        waiting = Counter(key for _, _, sources in order for key in sources if key)
        values: dict[Key, Array] = {}
        steps: dict[Key, tuple[Step, Key]] = {}
        for key, what, sources in order:
            if not isinstance(what, onnx.NodeProto):
                values[key] = self._read(what)
                continue
            inputs = [values[source] if source else None for source in sources]
            values[key] = computed(what, key[1], inputs, self._opset, self._spend, self._read)
            main = main_input(what, inputs, values[key])
            if main is not None and (source := sources[main]):
                steps[key] = step_of(what, main, inputs, values[key]), source
            for gone in filter(None, sources):
                waiting[gone] -= 1
                if not waiting[gone]:
                    values.pop(gone, None)
        target = order[-1][0]
        if steps:
            self._spend(_MEASURED * values[target].size)
        way: list[Step] = []
        key = target
        while key in steps:
            step, key = steps[key]
            way.append(step)
        owner, stored = key
        return Constant(
            values=values[target],
            stored=stored,
            steps=tuple(way),
            sparse=isinstance(owner.stored.get(stored), onnx.SparseTensorProto),
            overridable=any(source in at.overridable for at, source in (entry[0] for entry in order)),
        )


def _n_stored(tensor: Stored) -> int:
    """Bytes that a stored tensor takes, in the model or in the file that it names."""
    if isinstance(tensor, onnx.TensorProto) and uses_external_data(tensor):
        return int(ExternalDataInfo(tensor).length or 0)
    return int(tensor.ByteSize())


def _n_bytes(worked_out: Constant | Unevaluated) -> int:
    return worked_out.values.nbytes if isinstance(worked_out, Constant) else 0


Source = tuple[Key, onnx.NodeProto | Stored, list[Key | None]]


def _sources(scope: Scope, name: str, spend: Callable[[int], None]) -> list[Source]:
    """A value and all that it is made of, makers before what they make, each with what it needs."""
    order: list[Source] = []
    seen: set[Key] = set()
    n_nodes = 0
    stack: list[tuple[Scope, str, Source | None]] = [(scope, name, None)]
    while stack:
        at, wanted, done = stack.pop()
        if done is not None:
            order.append(done)
            continue
        found = at.find(wanted)
        assert found is not None, "a constant comes from somewhere"
        owner, what = found
        key = (owner, wanted)
        if key in seen:
            continue
        seen.add(key)
        if not isinstance(what, onnx.NodeProto):
            order.append((key, what, []))
            continue
        _require_known(what)
        spend(WORK_OF_A_STEP)
        n_nodes += 1
        if n_nodes > MAX_NODES:
            raise NotEvaluatedError(f"is computed by more than {MAX_NODES} nodes")
        places = [owner.find(source) if source else None for source in what.input]
        needed = [
            None if place is None else (place[0], source)
            for place, source in zip(places, what.input, strict=True)
        ]
        stack.append((owner, wanted, (key, what, needed)))
        stack.extend((*key, None) for key in needed if key)
    return order


def _require_known(node: onnx.NodeProto) -> None:
    if not has_known_size(node):
        operator = node.op_type if is_standard(node) else f"{node.domain}::{node.op_type}"
        raise NotEvaluatedError(f"is computed by {operator}, which is not evaluated here")
