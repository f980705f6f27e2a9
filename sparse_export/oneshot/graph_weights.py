"""Which weights of a graph get the pattern, which stay dense and why, and which values they are multiplied by."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import onnx

from sparse_export.errors import UsageError
from sparse_export.graph.layer_uses import OtherLayer, layer_uses
from sparse_export.graph.layers import FLOATS
from sparse_export.graph.scopes import Scope, scopes
from sparse_export.graph.stored_tensors import Read, array_of
from sparse_export.oneshot.graph_statistics import Factor, factor_of
from sparse_export.oneshot.weight_form import WeightForm, form_of
from sparse_export.oneshot.wiring import Wiring
from sparse_export.sparsity.caps import Cap
from sparse_export.sparsity.eligible import SMALL_SHARE, capped_layers
from sparse_export.sparsity.pattern import NMPattern

__all__ = ["GraphWeight", "WeightUse", "WeightsOfGraph", "weights_of_graph", "with_uses_in"]

_NO_OUTPUT = "the outputs do not hang on it"
_NOT_CHOSEN = "another layer was chosen"


@dataclass(frozen=True, kw_only=True)
class WeightUse:
    """A layer that multiplies by a weight.

    Attributes:
        node: its index among the nodes of the graph.
        factor: what it multiplies the weight by.
    """

    node: int
    factor: Factor


@dataclass(frozen=True, kw_only=True)
class GraphWeight:
    """A weight that gets the pattern.

    Attributes:
        name: of the stored tensor.
        form: how that tensor is (O, I, …).
        cap: along axis 1 of that.
        uses: the layers that multiply by it, in graph order.
        unseen: why what it is multiplied by cannot be seen; empty where it can.
    """

    name: str
    form: WeightForm
    cap: Cap
    uses: tuple[WeightUse, ...]
    unseen: str = ""


@dataclass(frozen=True, kw_only=True)
class WeightsOfGraph:
    """All weights of a graph.

    Attributes:
        pruned: those that get the pattern, in graph order.
        dense: why each of the others stays as it is, by name of the stored tensor; of the value that a layer
            gets, where nothing is stored under one name.
        names: of both, in graph order; what is not looked into comes last.
    """

    pruned: tuple[GraphWeight, ...]
    dense: dict[str, str]
    names: tuple[str, ...]


def weights_of_graph(
    model: onnx.ModelProto,
    wiring: Wiring,
    pattern: NMPattern,
    *,
    keep_dense: Sequence[str] = (),
    planned_dense: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
    read: Read = array_of,
) -> WeightsOfGraph:
    """Divide the weights of a graph into those that get the pattern and those that stay dense.

    Args:
        model: without functions of its own, and with its constants stored as initializers, as far as may be.
        wiring: of its graph.
        pattern: N:M.
        keep_dense: shell patterns of weights, or of the nodes that multiply by them.
        planned_dense: weights that a plan leaves dense, with its reasons; it decides about small layers too.
        only: the weights that get the pattern, as far as they can; None for all that should.
        read: gives the values of what the model stores.

    Raises:
        UsageError: a pattern or the plan names no weight, or no weight can take the pattern.
        ArtefactError: the graph is invalid.
    """
    found, others = _collected(model, wiring, read)
    _require_known(found, keep_dense, planned_dense or {})
    forms, unfit = _forms(model, found, wiring)
    named = {
        name
        for name, uses in found.items()
        if any(fnmatchcase(text, glob) for glob in keep_dense for text in (name, *uses.nodes))
    }
    ends = _ends(found, wiring)
    unfit |= {name: _NO_OUTPUT for name, end in ends.items() if end == "unused" and name not in unfit}
    unfit |= planned_dense or {}
    caps, reasons = capped_layers(
        {name: form.shape for name, form in forms.items()},
        dict.fromkeys(forms, 1),
        pattern,
        outputs=[name for name, end in ends.items() if end == "output"],
        keep_dense=named | unfit.keys(),
        small_share=SMALL_SHARE if planned_dense is None else 0.0,
    )
    reasons |= {name: why for name, why in unfit.items() if name not in named}
    if only is not None:
        caps = {name: Cap(pattern=pattern, axis=1) for name in forms if name in only and name not in unfit}
        reasons = dict.fromkeys(found, _NOT_CHOSEN) | reasons
    others = {name: why for name, why in others.items() if name not in found}
    dense = {name: reasons[name] for name in found if name not in caps} | others
    if not caps:
        listed = "; ".join(f"{name}: {why}" for name, why in dense.items())
        raise UsageError(
            f"The graph has no weight for the pattern {pattern}: {listed or 'it has no weight at all'}.",
            expected="At least one Conv, ConvTranspose, Gemm or MatMul that can take it was expected.",
            do="Choose another pattern, or name fewer layers in --keep-dense.",
        )
    pruned = [
        GraphWeight(name=name, form=forms[name], cap=cap, uses=found[name].seen, unseen=found[name].unseen)
        for name, cap in caps.items()
    ]
    return WeightsOfGraph(pruned=tuple(pruned), dense=dense, names=(*found, *others))


def with_uses_in(
    weights: Sequence[GraphWeight], walked: onnx.ModelProto, wiring: Wiring, *, read: Read = array_of
) -> tuple[GraphWeight, ...]:
    """The weights with the layers of another graph that stores them alike.

    Args:
        weights: of a graph.
        walked: the same graph, prepared to be walked: with branches in place of a choice, say.
        wiring: of it.
        read: gives the values of what it stores.
    """
    found, _ = _collected(walked, wiring, read)
    result = []
    for weight in weights:
        uses = found.get(weight.name)
        if uses is None or (not uses.uses and not uses.unseen):
            why = "no branch that multiplies by it is taken on the calibration inputs"
            result.append(replace(weight, uses=(), unseen=why))
        else:
            result.append(replace(weight, uses=uses.seen, unseen=uses.unseen))
    return tuple(result)


@dataclass(kw_only=True)
class _Uses:
    """What multiplies by one stored tensor.

    nodes: names.  operands: with the position of the weight.  uses: of the graph's own nodes.  holders: nodes
    of the graph with a layer inside.  why: it cannot be pruned; empty where it can.
    """

    form: WeightForm | None = None
    nodes: list[str]
    operands: set[tuple[str, int]]
    uses: list[WeightUse]
    holders: set[int]
    unseen: str = ""
    why: str = ""

    @property
    def seen(self) -> tuple[WeightUse, ...]:
        return tuple(sorted(self.uses, key=lambda use: use.node))


def _collected(model: onnx.ModelProto, wiring: Wiring, read: Read) -> tuple[dict[str, _Uses], dict[str, str]]:
    """The layers by the tensor that is stored for their weight; and reasons of what is not looked into."""
    outer = next(scopes(model, model.graph.node))
    index = {name: i for i, name in enumerate(outer.names)}
    found: dict[str, _Uses] = {}
    others: dict[str, str] = {}
    for use in layer_uses(model, read=read):
        if isinstance(use, OtherLayer):
            if use.name and not {"activations", "not-constant"}.intersection(one.code for one in use.why):
                others.setdefault(use.name, "; ".join(one.text.rstrip(".") for one in use.why))
            continue
        uses = found.setdefault(use.stored, _Uses(nodes=[], operands=set(), uses=[], holders=set()))
        uses.nodes.append(use.where)
        uses.operands.add((use.where, use.position))
        form = form_of(use)
        if isinstance(form, str):
            uses.why = uses.why or form
        elif uses.form is None:
            uses.form = form
        elif not uses.form.is_along(form):
            uses.why = uses.why or (
                f"{uses.nodes[0]} and {use.where} multiply by it along different axes, and no pattern holds "
                "along both"
            )
        node = index.get(use.where) if not use.scope.path else None
        if node is None or model.graph.node[node].output[:1] != use.node.output[:1]:
            uses.unseen = uses.unseen or f"{use.where} stands in a branch or loop, so its inputs are not seen"
            uses.holders |= {
                i
                for name, i in index.items()
                if use.scope.path.startswith(f"{name}/") and i in wiring.with_bodies
            }
        else:
            uses.uses.append(WeightUse(node=node, factor=factor_of(use)))
    return found, others


def _forms(
    model: onnx.ModelProto, found: Mapping[str, _Uses], wiring: Wiring
) -> tuple[dict[str, WeightForm], dict[str, str]]:
    """The forms of weights, and why some cannot be pruned although they have one, or have none."""
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    other_readers = _other_readers(model, found)
    forms: dict[str, WeightForm] = {}
    unfit: dict[str, str] = {}
    for name, uses in found.items():
        if uses.form is not None:
            forms[name] = uses.form
        if uses.why:
            unfit[name] = uses.why
        elif name not in types:
            unfit[name] = "it is not stored in the graph itself"
        elif types[name] not in FLOATS:
            kind = onnx.TensorProto.DataType.Name(types[name]).lower()
            unfit[name] = f"it is stored as {kind}, which is quantized already"
        elif name in other_readers:
            unfit[name] = f"{other_readers[name]} reads it too, and multiplies nothing by it"
        elif name in wiring.outputs:
            unfit[name] = "it is an output of the graph"
    return forms, unfit


def _other_readers(model: onnx.ModelProto, found: Mapping[str, _Uses]) -> dict[str, str]:
    """By stored tensor a node that reads it, or what is computed of it alone, as no layer does."""
    layers = set().union(*(uses.operands for uses in found.values()))
    readers: dict[str, str] = {}
    for scope in scopes(model, model.graph.node):
        for node, known_as in zip(scope.nodes, scope.names, strict=True):
            if scope.constant.issuperset(node.output):
                continue  # on the way from a tensor to a layer
            where = f"{scope.path}{known_as}"
            for position, name in enumerate(node.input):
                if name and (where, position) not in layers:
                    for stored in _made_of(scope, name):
                        readers.setdefault(stored, f"{node.op_type} {where}")
    return readers


def _made_of(scope: Scope, name: str) -> Iterator[str]:
    """The stored tensors that a constant is made of; none for what is no constant."""
    stack, seen = [(scope, name)], set()
    while stack:
        at, wanted = stack.pop()
        place = at.find(wanted)
        if place is None or (place[0].path, wanted) in seen:
            continue
        owner, what = place
        seen.add((owner.path, wanted))
        if not isinstance(what, onnx.NodeProto):
            yield wanted
        elif wanted in owner.constant and what.op_type not in ("Shape", "Size"):
            stack += [(owner, source) for source in what.input if source]


def _ends(found: Mapping[str, _Uses], wiring: Wiring) -> dict[str, str]:
    """Of each weight `output` where no layer comes after it, `unused` where no output hangs on it, else
    `inner`.
    """
    layers = {use.node for uses in found.values() for use in uses.uses}
    layers |= {node for uses in found.values() for node in uses.holders}
    to_output, to_layer = wiring.leading_to(outputs=True), wiring.leading_to(nodes=layers)
    ends = {}
    for name, uses in found.items():
        if not uses.uses or uses.unseen:
            continue
        used = [use.node for use in uses.uses if use.node in to_output]
        if not used:
            ends[name] = "unused"
        else:
            ends[name] = "inner" if any(node in to_layer for node in used) else "output"
    return ends


def _require_known(
    found: Mapping[str, _Uses], keep_dense: Sequence[str], planned_dense: Mapping[str, str]
) -> None:
    for glob in keep_dense:
        if not any(fnmatchcase(text, glob) for name, uses in found.items() for text in (name, *uses.nodes)):
            raise UsageError(
                f"keep_dense names {glob!r}, which is no weight of the graph, and no node that multiplies "
                "by one.",
                expected=f"One of these, or a pattern, was expected: {', '.join(found) or 'none'}.",
                do="`sparse-export inspect` lists them with their nodes.",
            )
    unknown = sorted(planned_dense.keys() - found.keys())
    if unknown:
        raise UsageError(
            f"The plan names {unknown[0]}, which is no weight of the graph.",
            expected=f"Some of these were expected: {', '.join(found) or 'none'}.",
            do="Make the plan of this graph.",
        )
