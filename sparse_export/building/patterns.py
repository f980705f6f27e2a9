"""What `build` does to make layers obey a pattern: the network, its graph, and what is told of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from sparse_export.errors import ArtefactError, DataNotFound, MissingCapability, UnknownNameError, UsageError
from sparse_export.formats.bundle import ORDERS_FILE, Bundle, CompactInfo
from sparse_export.formats.listed import bytes_of
from sparse_export.formats.run import LayerInfo, RunInfo
from sparse_export.graph.layers import graph_layers
from sparse_export.graph.passes.compact import Compacted, with_gathers
from sparse_export.graph.passes.compact import compact as compacted_graph
from sparse_export.graph.passes.fit_pattern import Fitted, Gather
from sparse_export.graph.passes.permute import reduction_axis, summed_parts
from sparse_export.graph.passes.reorder_input import gathered
from sparse_export.runtimes.logits import onnx_logits, torch_logits
from sparse_export.runtimes.parity import require_same_output
from sparse_export.sparsity import capped_layers
from sparse_export.sparsity.eligible import SMALL_SHARE
from sparse_export.sparsity.pattern import NMPattern, pattern_from_text
from sparse_export.tasks.labels import accuracy_of, correct_predictions, predicted_classes
from sparse_export.tasks.samples import load_test_set
from sparse_export.train.layers import output_layers

__all__ = [
    "ORDERS_FILE",
    "layer_facts",
    "masks_with_promises",
    "measured",
    "never_cut",
    "orders_of_bundle",
    "require_in_plan",
    "require_no_other_promise",
    "rewritten",
    "wanted_pattern",
]

IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


def wanted_pattern(pattern: str | NMPattern | None, max_cut: float, gather: str) -> NMPattern | None:
    if not (isinstance(max_cut, int | float) and 0 <= max_cut < 1):
        raise UsageError(
            f"The largest cut is {max_cut!r}.",
            expected="A share of each layer's sum of |weights|, from 0 to below 1, was expected.",
        )
    if gather not in get_args(Gather):
        raise UnknownNameError("gather", gather, get_args(Gather))
    if pattern is None and max_cut:
        raise UsageError(
            f"A cut of up to {max_cut:g} was allowed, but no pattern was asked for.",
            expected="max_cut was expected together with a pattern.",
            do="Give --pattern 2:4.",
        )
    return pattern_from_text(pattern) if isinstance(pattern, str) else pattern


def require_no_other_promise(layers: Sequence[LayerInfo], wanted: NMPattern | None) -> None:
    for layer in layers:
        if wanted is not None and layer.pattern not in (None, str(wanted)):
            raise UsageError(
                f"{layer.name} was trained for {layer.pattern}, and {wanted} was asked for.",
                expected="A run that promises no pattern, or the same, was expected.",
                do=f"Ask for {layer.pattern}, or for none.",
            )


def require_in_plan(layers: Sequence[LayerInfo], planned_dense: Mapping[str, str]) -> None:
    """Raise UsageError for a plan of other layers, or one that leaves dense what the run promises a pattern for."""
    promised = {layer.name: layer.pattern for layer in layers}
    unknown = sorted(planned_dense.keys() - promised.keys())
    if unknown:
        raise UsageError(
            f"The plan leaves {', '.join(unknown)} dense.",
            expected=f"The run's layers were expected: {', '.join(promised)}.",
            do="Plan the network of this run.",
        )
    for name in planned_dense:
        if promised[name] is not None:
            raise UsageError(
                f"{name} was trained for {promised[name]}, and the plan leaves it dense.",
                expected="A run that promises no pattern there was expected.",
                do="Build without the plan, or train by it from the start: `train --plan`.",
            )


def never_cut(
    network: nn.Module,
    sample: Tensor,
    names: Sequence[str],
    pattern: NMPattern,
    *,
    small_share: float = SMALL_SHARE,
) -> dict[str, str]:
    """The weights that a trainer would not put under a pattern either, with its reasons: outputs, and small layers.

    sample: one input batch; the layer that the network calls last on it is the one that gives the outputs.
    small_share: see `sparse_export.sparsity.eligible`.
    """
    shapes = {name: tuple(network.get_parameter(name).shape) for name in names}
    axes = {name: reduction_axis(network, name) for name in names}
    parts = {name: summed_parts(network, name) for name in names}
    with torch.no_grad():
        outputs = output_layers(network, lambda: network(sample))
    _, reasons = capped_layers(shapes, axes, pattern, parts=parts, outputs=outputs, small_share=small_share)
    return reasons


def masks_with_promises(
    network: nn.Module, masks: Mapping[str, Tensor], fitted: Fitted | None
) -> dict[str, Tensor]:
    """The masks, and for weights without one that promise a pattern what is not zero in them."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    added = [] if fitted is None else [name for name in fitted.obeying if name not in masks]
    return dict(masks) | {name: parameters[name].detach() != 0 for name in added}


def layer_facts(
    layers: Sequence[LayerInfo],
    network: nn.Module,
    masks: Mapping[str, Tensor],
    wanted: NMPattern | None,
    fitted: Fitted | None,
) -> tuple[LayerInfo, ...]:
    """The run's layers with the pattern that they promise now, and what is left after a cut."""
    if fitted is None:
        return tuple(layers)
    obeying = set(fitted.obeying)
    n_cut = {layer.name: layer.n_cut for layer in fitted.layers}
    reasons = {layer.name: layer.reason for layer in fitted.layers}
    parameters = dict(network.named_parameters(remove_duplicate=False))
    found = []
    for layer in layers:
        n_active = layer.n_active
        if n_cut[layer.name]:
            kept = masks[layer.name] if layer.name in masks else parameters[layer.name] != 0
            n_active = int(kept.sum())
        # What the run promised stays promised, so that the gate finds out where it does not hold.
        pattern = str(wanted) if layer.name in obeying else layer.pattern
        why_dense = reasons[layer.name] if pattern is None else None
        found.append(replace(layer, n_active=n_active, pattern=pattern, why_dense=why_dense))
    return tuple(found)


def rewritten(
    model: onnx.ModelProto,
    input_shape: Sequence[int],
    promised: Mapping[str, NMPattern],
    fitted: Fitted | None,
    compact: bool,
) -> tuple[onnx.ModelProto, CompactInfo | None]:
    """The graph without its dead channels, if asked for, and with gathered inputs; what went.

    Compacting comes last but one: groups of a promised pattern leave whole, those of a gathered weight counted in
    the order that it will have.
    """
    orders = {} if fitted is None else {name: order.numpy() for name, order in fitted.gathers.items()}
    found = None
    if compact:
        sizes = {name: len(order) for name, order in orders.items()} | _n_inputs(
            model, promised.keys() - orders.keys()
        )
        together = {
            name: orders[name].argsort() // promised[name].m
            if name in orders
            else np.arange(n) // promised[name].m
            for name, n in sizes.items()
        }
        whole = model
        found = compacted_graph(whole, together=together, unpicked=orders.keys())
        model = found.model
        require_same_output(whole, model, input_shape)
        orders = {name: _among(order, found.kept[name]) for name, order in orders.items()}
    if orders:
        patterns = {promised[name].m for name in orders}
        whole, model = model, gathered(model, orders, live_only=patterns.pop() if compact else None)
        require_same_output(whole, model, input_shape, by="gathered")
        if found is not None:
            found = with_gathers(found, model, {name: promised[name].m for name in orders})
    return model, None if found is None else _compact_fact(found)


def _n_inputs(model: onnx.ModelProto, names: AbstractSet[str]) -> dict[str, int]:
    return {
        layer.weight: layer.shape[layer.reduction_axis]
        for layer in graph_layers(model)
        if layer.weight in names
    }


def _among(order: IntArray, kept: IntArray) -> IntArray:
    """An order of the entries that were kept, by their new numbers."""
    number = np.full(len(order), -1)
    number[kept] = np.arange(len(kept))
    found = number[order]
    left: IntArray = found[found >= 0]
    return left


def measured(info: RunInfo, before: nn.Module, file: Path, data_dir: str | Path | None) -> dict[str, Any]:
    """Accuracy of the run's network and of the file on the test set, or why there is none."""
    missing: dict[str, Any] = {"accuracy_before": None, "accuracy_after": None, "n_changed": None}
    if info.data is None:
        return missing | {"not_measured": "the run names no data set"}
    try:  # the bundle is as good without a score
        inputs, labels = load_test_set(info.data, info.model, data_dir, network="the network", do="")
    except (DataNotFound, MissingCapability, UsageError) as cause:
        return missing | {"not_measured": cause.what.rstrip(".")}
    logits = torch_logits(before, inputs), onnx_logits(file, inputs)
    return {
        "accuracy_before": accuracy_of(correct_predictions(logits[0], labels)),
        "accuracy_after": accuracy_of(correct_predictions(logits[1], labels)),
        "n_changed": int((predicted_classes(logits[0]) != predicted_classes(logits[1])).sum()),
        "not_measured": None,
    }


def _compact_fact(found: Compacted) -> CompactInfo:
    return CompactInfo(
        n_removed=found.n_removed,
        n_inputs_dropped=found.n_inputs_dropped,
        n_weights_before=found.n_weights_before,
        n_weights_after=found.n_weights_after,
        layers=found.layers,
    )


def orders_of_bundle(bundle: Bundle) -> dict[str, Any]:
    """The record of a bundle whose channels were put in another order, as `replay` takes it. Raises ArtefactError."""
    try:
        document = json.loads(bytes_of(bundle, ORDERS_FILE))
    except (ValueError, RecursionError) as cause:
        raise ArtefactError(
            f"{bundle.path / ORDERS_FILE} cannot be read: {cause}.",
            expected="The record of what was permuted and cut was expected.",
            do="Build the bundle again.",
        ) from cause
    if not isinstance(document, dict):
        raise ArtefactError(f"{bundle.path / ORDERS_FILE} holds no record.", do="Build the bundle again.")
    return document
