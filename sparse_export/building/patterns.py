"""Makes the graph of a network satisfy a pattern, and reports the score before and after."""

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

from sparse_export.building.fold_preprocess import RawInput
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
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.runtimes.outputs import outputs_of, outputs_of_file
from sparse_export.runtimes.parity import require_same_output
from sparse_export.runtimes.session import only_array
from sparse_export.runtimes.torch_session import TorchSession
from sparse_export.signature import Signature
from sparse_export.sparsity import capped_layers
from sparse_export.sparsity.eligible import SMALL_SHARE
from sparse_export.sparsity.pattern import NMPattern, pattern_from_text
from sparse_export.tasks.labels import predicted_classes
from sparse_export.tasks.samples import load_test_set
from sparse_export.tasks.shipped import Classification, task_named
from sparse_export.train.layers import output_layers

__all__ = [
    "ORDERS_FILE",
    "ineligible_weights",
    "layer_infos",
    "masks_with_promises",
    "measure_scores",
    "parse_pattern",
    "read_orders",
    "require_in_plan",
    "require_same_pattern",
    "rewrite_graph",
    "with_pattern",
]

IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


def parse_pattern(pattern: str | NMPattern | None, max_cut: float, gather: str) -> NMPattern | None:
    """Parse the pattern of a build, and check the options that go with it.

    Args:
        pattern: such as `2:4`, or None for none.
        max_cut: share of sum |w|, from 0 to below 1, that a layer may lose.
        gather: `none`, `input` or `any`.

    Raises:
        UsageError: the text is no pattern, max_cut is out of range, or it is given without a pattern.
        UnknownNameError: there is no such gather.
    """
    if not (isinstance(max_cut, int | float) and 0 <= max_cut < 1):
        raise UsageError(
            f"max_cut is {max_cut!r}, not a share of sum |w| from 0 to below 1.",
            do="Give for instance 0.01.",
        )
    if gather not in get_args(Gather):
        raise UnknownNameError("gather", gather, get_args(Gather))
    if pattern is None and max_cut:
        raise UsageError(
            f"Layers may lose up to {max_cut:g} of sum |w|, but no pattern was requested.",
            do="Give --pattern 2:4.",
        )
    return pattern_from_text(pattern) if isinstance(pattern, str) else pattern


def require_same_pattern(layers: Sequence[LayerInfo], wanted: NMPattern | None) -> None:
    """Check that no layer promises another pattern than the wanted one.

    Args:
        layers: of the run.
        wanted: the pattern, None for none.

    Raises:
        UsageError: a layer was trained for another.
    """
    for layer in layers:
        if wanted is not None and layer.pattern not in (None, str(wanted)):
            raise UsageError(
                f"{layer.name} was trained for {layer.pattern}, and {wanted} was requested.",
                do=f"Request {layer.pattern}, or no pattern.",
            )


def require_in_plan(layers: Sequence[LayerInfo], planned_dense: Mapping[str, str]) -> None:
    """Check that a layer plan fits a run.

    Args:
        layers: of the run.
        planned_dense: weights that the plan leaves dense, each with its reason.

    Raises:
        UsageError: the run has no such layer, or promises a pattern for one of them.
    """
    promised = {layer.name: layer.pattern for layer in layers}
    unknown = sorted(planned_dense.keys() - promised.keys())
    if unknown:
        raise UsageError(
            f"The plan leaves {', '.join(unknown)} dense, which the run does not have.",
            expected=f"The run's layers are {', '.join(promised)}.",
            do="Plan the network of this run.",
        )
    for name in planned_dense:
        if promised[name] is not None:
            raise UsageError(
                f"{name} was trained for {promised[name]}, and the plan leaves it dense.",
                do="Build without the plan, or train by it from the start: `train --plan`.",
            )


def ineligible_weights(
    network: nn.Module,
    sample: Tensor,
    names: Sequence[str],
    pattern: NMPattern,
    *,
    small_share: float = SMALL_SHARE,
) -> dict[str, str]:
    """Find the weights that training would not put under a pattern either: output and small layers.

    Args:
        network: the network of the run.
        sample: one input batch; the layer that the network calls last on it is the output layer.
        names: of the weights to look at.
        pattern: the pattern.
        small_share: share of all weights below which a layer is small; see `sparse_export.sparsity.eligible`.

    Returns:
        The reason for each of them, by name.
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
    """Add masks for unmasked weights that now satisfy a pattern.

    Args:
        network: holds the weights.
        masks: by weight, of the weight's shape, True = kept.
        fitted: what was done to satisfy a pattern, None for nothing.

    Returns:
        The masks; an added one keeps the nonzero entries.
    """
    parameters = dict(network.named_parameters(remove_duplicate=False))
    added = [] if fitted is None else [name for name in fitted.obeying if name not in masks]
    return dict(masks) | {name: parameters[name].detach() != 0 for name in added}


def layer_infos(
    layers: Sequence[LayerInfo],
    network: nn.Module,
    masks: Mapping[str, Tensor],
    wanted: NMPattern | None,
    fitted: Fitted | None,
) -> tuple[LayerInfo, ...]:
    """Update the run's records of its layers after they were made to satisfy a pattern.

    Args:
        layers: of the run.
        network: with its weights as they are now.
        masks: by weight, of the weight's shape, True = kept.
        wanted: the pattern, None for none.
        fitted: what was done to satisfy it, None for nothing.

    Returns:
        The layers with the pattern that each promises now, and the number of weights that are left.
    """
    if fitted is None:
        return tuple(layers)
    satisfying = set(fitted.obeying)
    n_dropped = {layer.name: layer.n_cut for layer in fitted.layers}
    reasons = {layer.name: layer.reason for layer in fitted.layers}
    parameters = dict(network.named_parameters(remove_duplicate=False))
    found = []
    for layer in layers:
        if layer.name not in n_dropped:  # computed from parameters, and no parameter itself
            found.append(layer)
            continue
        n_active = layer.n_active
        if n_dropped[layer.name]:
            kept = masks[layer.name] if layer.name in masks else parameters[layer.name] != 0
            n_active = int(kept.sum())
        # What the run promised stays promised, so that the gate finds out where it does not hold.
        pattern = str(wanted) if layer.name in satisfying else layer.pattern
        why_dense = reasons[layer.name] if pattern is None else None
        found.append(replace(layer, n_active=n_active, pattern=pattern, why_dense=why_dense))
    return tuple(found)


def with_pattern(layers: Sequence[LayerInfo], wanted: NMPattern, fitted: Fitted) -> tuple[LayerInfo, ...]:
    """Update the records of a graph's weights after they were made to satisfy a pattern without a loss.

    Args:
        layers: of the run.
        wanted: the pattern.
        fitted: what was done.

    Returns:
        The layers with the pattern that each promises now.
    """
    satisfying = set(fitted.obeying)
    reasons = {layer.name: layer.reason for layer in fitted.layers}
    found = []
    for layer in layers:
        pattern = str(wanted) if layer.name in satisfying else layer.pattern
        why_dense = reasons.get(layer.name, layer.why_dense) if pattern is None else None
        found.append(replace(layer, pattern=pattern, why_dense=why_dense))
    return tuple(found)


def rewrite_graph(
    model: onnx.ModelProto,
    signature: Signature,
    promised: Mapping[str, NMPattern],
    fitted: Fitted | None,
    compact: bool,
) -> tuple[onnx.ModelProto, CompactInfo | None]:
    """Remove the dead channels of a graph, if requested, and gather the inputs of layers that need it.

    Compacting comes before gathering: groups of a promised pattern are removed whole, those of a gathered
    weight counted in the order that it will have.

    Args:
        model: the exported graph.
        signature: of the network.
        promised: patterns, by weight.
        fitted: what was done to satisfy a pattern, with the orders of gathered inputs; None for nothing.
        compact: remove dead channels.

    Returns:
        The graph, and what was removed; None without compacting.

    Raises:
        GateFailed: the output of the graph changed by more than rounding explains.
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
        require_same_output(whole, model, signature)
        orders = {name: _among(order, found.kept[name]) for name, order in orders.items()}
    if orders:
        patterns = {promised[name].m for name in orders}
        whole, model = model, gathered(model, orders, live_only=patterns.pop() if compact else None)
        require_same_output(whole, model, signature, by="gathered")
        if found is not None:
            found = with_gathers(found, model, {name: promised[name].m for name in orders})
    return model, None if found is None else _compact_info(found)


def _n_inputs(model: onnx.ModelProto, names: AbstractSet[str]) -> dict[str, int]:
    """Length of the reduction axis of some weights."""
    return {
        layer.weight: layer.shape[layer.reduction_axis]
        for layer in graph_layers(model)
        if layer.weight in names
    }


def _among(order: IntArray, kept: IntArray) -> IntArray:
    """Restrict an order to the entries that were kept, renumbered."""
    number = np.full(len(order), -1)
    number[kept] = np.arange(len(kept))
    found = number[order]
    left: IntArray = found[found >= 0]
    return left


def measure_scores(
    info: RunInfo,
    before: nn.Module | Path,
    file: Path,
    data_dir: str | Path | None,
    of_file: Signature | None = None,
    *,
    raw: RawInput | None = None,
    workers: int = 0,
) -> dict[str, Any]:
    """Measure the score of the run's network and of an ONNX file on the run's test set.

    Args:
        info: of the run.
        before: the network as the run has it; its file where the run holds a graph.
        file: the ONNX file of the bundle.
        data_dir: where the data sets lie.
        of_file: signature of the file; None for that of the run.
        raw: what the file takes in place of the network's input; None for that.
        workers: processes that decode pictures; 0 for threads.

    Returns:
        The last four fields of `PatternInfo`; `not_measured` has the reason where there is no score.
    """
    missing: dict[str, Any] = {"score_before": None, "score_after": None, "n_changed": None}
    if info.data is None:
        return missing | {"not_measured": "the run names no data set"}
    signature = info.signature
    try:  # the bundle is as good without a score
        task = task_named(info.task.name)
        test = load_test_set(
            *(info.data, signature, data_dir),
            task=task,
            network="the network",
            do="",
            workers=workers,
            raw=None if raw is None else raw.dtype,
        )
        opened = (
            open_session(before, signature=signature)
            if isinstance(before, Path)
            else TorchSession(before, signature)
        )
        with opened as network:
            session = network if raw is None else raw.session(network)
            first = outputs_of(session, test.samples, who="The network")
        second = outputs_of_file(file, test.samples, signature=of_file or signature)
        scores = [task.score(task.statistics(outputs, test.targets[:])) for outputs in (first, second)]
    except (DataNotFound, MissingCapability, UsageError) as cause:
        return missing | {"not_measured": cause.what.rstrip(".")}
    changed = None
    if signature.n_classes is not None and isinstance(task, Classification):
        logits = [only_array(outputs, "The network") for outputs in (first, second)]
        changed = int((predicted_classes(logits[0]) != predicted_classes(logits[1])).sum())
    return {
        "score_before": scores[0],
        "score_after": scores[1],
        "n_changed": changed,
        "not_measured": None,
    }


def _compact_info(found: Compacted) -> CompactInfo:
    """The record of what was removed."""
    return CompactInfo(
        n_removed=found.n_removed,
        n_inputs_dropped=found.n_inputs_dropped,
        n_weights_before=found.n_weights_before,
        n_weights_after=found.n_weights_after,
        layers=found.layers,
    )


def read_orders(bundle: Bundle) -> dict[str, Any]:
    """Read `orders.json`, the record of what was permuted and dropped, as `replay` takes it.

    Args:
        bundle: one that was built for a pattern.

    Raises:
        ArtefactError: the bundle has no such file, or it was changed or is damaged.
    """
    try:
        document = json.loads(bytes_of(bundle, ORDERS_FILE))
    except (ValueError, RecursionError) as cause:
        raise ArtefactError(
            f"{bundle.path / ORDERS_FILE} is not JSON: {cause}.",
            do="Build the bundle again.",
        ) from cause
    if not isinstance(document, dict):
        raise ArtefactError(f"{bundle.path / ORDERS_FILE} is no JSON object.", do="Build the bundle again.")
    return document
