"""Chooses the layers of a network to make 2:4, from times measured on one GPU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from sparse_export.errors import SpeedupNotReached, UsageError
from sparse_export.formats.layer_plan import LayerPlan, PlannedLayer, read_layer_plan, write_layer_plan
from sparse_export.formats.timings import ProductTiming, Size, Timings
from sparse_export.instruments.statistics import location, paired_ratio
from sparse_export.plan.choose import least_lost, most_saved
from sparse_export.plan.layers import Product
from sparse_export.version import command_line, library_versions, now

__all__ = ["LayerPlan", "PlannedLayer", "dense_by_plan", "make_plan", "read_layer_plan", "write_layer_plan"]


def make_plan(
    products: tuple[Product, ...],
    timings: Timings,
    *,
    model: str | None,
    batch: int,
    weights: str,
    speedup: float | None = None,
    max_sparse_loss: float | None = None,
) -> LayerPlan:
    """Choose layers by what they save and what they lose.

    A layer can be chosen only where the whole interval of dense / 2:4 is above 1, so that no product gets
    slower. It counts with what it saves at the low end of that interval. Without a requirement every such
    layer is chosen.

    Args:
        products: of the network's layers.
        timings: of their sizes.
        model: name of the network, None where it has none.
        batch: samples in a call.
        weights: whose magnitudes were counted, for the record.
        speedup: above 1; the layers of least loss that are expected to reach it are chosen.
        max_sparse_loss: from 0 to 1; the layers that save most are chosen, of at most this share of sum |w|
            in total.

    Returns:
        The plan.

    Raises:
        UsageError: a requirement is out of range, both are given, or the timings are of another batch or
            network.
        SpeedupNotReached: all layers together are not expected to reach the speed-up.
    """
    _check(timings, model, batch, speedup, max_sparse_loss)
    timed = {product.size: product for product in timings.products}
    model_ms = location(timings.model_ms).estimate
    rated = [_rate(product, timed) for product in products]
    eligible = [i for i, layer in enumerate(rated) if layer.sparse]
    saved = [rated[i].saved_ms for i in eligible]
    lost = [rated[i].lost or 0.0 for i in eligible]
    if speedup is not None:
        chosen = least_lost(saved, lost, model_ms * (1 - 1 / speedup))
        if chosen is None:
            reached = model_ms / (model_ms - min(sum(saved), 0.999 * model_ms))
            raise SpeedupNotReached(
                f"All {len(eligible)} layers that are faster as 2:4 are together expected to give "
                f"{reached:.3f}x, and {speedup:g}x was required.",
                do="Require less, plan for a larger batch, or see the reasons in a plan without one.",
            )
    elif max_sparse_loss is not None:
        chosen = most_saved(saved, lost, max_sparse_loss)
    else:
        chosen = tuple(range(len(eligible)))
    kept = {eligible[i] for i in chosen}
    layers = tuple(
        layer if not layer.sparse or i in kept else _left_out(layer) for i, layer in enumerate(rated)
    )
    saved_ms = sum(layer.saved_ms for layer in layers if layer.sparse)
    return LayerPlan(
        model=model,
        batch=batch,
        dtype=timings.dtype,
        backend=timings.backend,
        device=timings.device,
        weights=weights,
        speedup=speedup,
        max_sparse_loss=max_sparse_loss,
        model_ms=model_ms,
        saved_ms=saved_ms,
        lost=sum(layer.lost or 0.0 for layer in layers if layer.sparse),
        expected_speedup=model_ms / (model_ms - min(saved_ms, 0.999 * model_ms)),
        layers=layers,
        versions=library_versions(),
        command=command_line(),
        created=now(),
    )


def dense_by_plan(path: Path, model: str | None, *, instead: str) -> dict[str, str]:
    """Read the weights that a layer plan leaves dense.

    Args:
        path: of the plan.
        model: the network's name, None where it has none.
        instead: what to do where the plan leaves all weights dense, a sentence.

    Returns:
        The reason for each of them, by name.

    Raises:
        UsageError: there is no file, it is another network's plan, or it has no layer to make 2:4.
        ArtefactError: the plan is damaged.
    """
    plan = read_layer_plan(path)
    if plan.model != model:
        raise UsageError(
            f"{path} is a plan for {plan.model or 'a network without a name'}, "
            f"not for {model or 'a network without a name'}.",
            do="Plan this network: `sparse-export plan MODEL --out FILE`.",
        )
    if not plan.sparse:
        raise UsageError(
            f"{path} leaves every layer dense.",
            do=instead,
        )
    return {layer.name: f"the plan leaves it dense: {layer.why}" for layer in plan.layers if not layer.sparse}


def _check(
    timings: Timings, model: str | None, batch: int, speedup: float | None, max_sparse_loss: float | None
) -> None:
    """Raise UsageError for invalid requirements, or timings of something else."""
    if speedup is not None and max_sparse_loss is not None:
        raise UsageError(
            "A speed-up and a largest loss are both given; they exclude each other.", do="Leave one out."
        )
    if speedup is not None and not (math.isfinite(speedup) and speedup > 1):
        raise UsageError(
            f"The speed-up is {speedup}, not a finite ratio above 1.", do="Give for instance 1.2."
        )
    if max_sparse_loss is not None and not 0 <= max_sparse_loss <= 1:
        raise UsageError(
            f"The largest loss is {max_sparse_loss}, not a share of sum |w| from 0 to 1.",
            do="Give for instance 0.1.",
        )
    for what, wanted, found in (("network", model, timings.model), ("batch", batch, timings.batch)):
        if wanted != found:
            raise UsageError(
                f"The timings are of the {what} {found}, not {wanted}.",
                do="Measure again, or plan for what was measured.",
            )


def _rate(product: Product, timed: Mapping[Size, ProductTiming]) -> PlannedLayer:
    """The record of a layer, `sparse` where it can be chosen."""
    timing = timed.get((product.n_outputs, product.n_inputs, product.n_rows or 0))
    why, ratio, saved_ms, shown = product.reason, None, 0.0, ""
    if why is None and timing is None:
        why = "its size was not timed"
    elif why is None and timing is not None:
        ratio = paired_ratio(timing.dense_ms, timing.sparse_ms)
        shown = f"dense / 2:4 is {ratio.estimate:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
        if ratio.low > 1:
            saved_ms = location(timing.dense_ms).estimate * (1 - 1 / ratio.low)
        else:
            why = f"it is not faster here: {shown}"
    return PlannedLayer(
        name=product.name,
        n_outputs=product.n_outputs,
        n_inputs=product.n_inputs,
        n_rows=product.n_rows,
        sparse=why is None,
        why=why or f"it is faster: {shown}",
        ratio=ratio,
        saved_ms=saved_ms,
        lost=product.lost,
    )


def _left_out(layer: PlannedLayer) -> PlannedLayer:
    """The record of a layer that could be chosen and was not."""
    return replace(layer, sparse=False, why="what it saves is not worth its weights under the requirement")
