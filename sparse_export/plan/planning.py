"""Chooses the layers of a network that are worth making 2:4, from times that were measured on one card."""

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

    A layer can be chosen only where the whole interval of dense / 2:4 lies above 1: no product gets slower. It counts
    with what it saves at the low end of that interval.
    speedup: least lost that is expected to reach it.  max_sparse_loss: most saved for at most this share of the
    magnitude of all weights. Neither: every layer that can be chosen.
    Raises UsageError for requirements without meaning or timings of another batch or network; SpeedupNotReached.
    """
    _check(timings, model, batch, speedup, max_sparse_loss)
    timed = {product.size: product for product in timings.products}
    model_ms = location(timings.model_ms).estimate
    rated = [_rated(product, timed) for product in products]
    open_to = [i for i, layer in enumerate(rated) if layer.sparse]
    saved = [rated[i].saved_ms for i in open_to]
    lost = [rated[i].lost or 0.0 for i in open_to]
    if speedup is not None:
        chosen = least_lost(saved, lost, model_ms * (1 - 1 / speedup))
        if chosen is None:
            reached = model_ms / (model_ms - min(sum(saved), 0.999 * model_ms))
            raise SpeedupNotReached(
                f"All {len(open_to)} layers that are faster as 2:4 together are expected to give {reached:.3f}x.",
                expected=f"{speedup:g}x was required.",
                do="Ask for less, plan for a larger batch, or see the plan without a requirement for the reasons.",
            )
    elif max_sparse_loss is not None:
        chosen = most_saved(saved, lost, max_sparse_loss)
    else:
        chosen = tuple(range(len(open_to)))
    kept = {open_to[i] for i in chosen}
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
    """The weights of a network that a plan file leaves dense, with its reasons.

    model: the network's name.  instead: what to do where the plan leaves all of them dense, a sentence.
    Raises UsageError for another network's plan, one without a layer to make 2:4, or no file; ArtefactError.
    """
    plan = read_layer_plan(path)
    if plan.model != model:
        raise UsageError(
            f"{path} is a plan for {plan.model or 'a network without a name'}.",
            expected=f"One for {model or 'a network without a name'} was expected.",
            do="LayerPlan the network in question.",
        )
    if not plan.sparse:
        raise UsageError(
            f"{path} leaves every layer dense.",
            expected="At least one layer to make 2:4 was expected.",
            do=instead,
        )
    return {layer.name: f"the plan leaves it dense: {layer.why}" for layer in plan.layers if not layer.sparse}


def _check(
    timings: Timings, model: str | None, batch: int, speedup: float | None, max_sparse_loss: float | None
) -> None:
    if speedup is not None and max_sparse_loss is not None:
        raise UsageError(
            "A speed-up and a largest loss were both given.", expected="One of them was expected, or none."
        )
    if speedup is not None and not (math.isfinite(speedup) and speedup > 1):
        raise UsageError(
            f"The speed-up is {speedup}.", expected="A finite ratio above 1 was expected, like 1.2."
        )
    if max_sparse_loss is not None and not 0 <= max_sparse_loss <= 1:
        raise UsageError(
            f"The largest loss is {max_sparse_loss}.",
            expected="A share of the weights' magnitude from 0 to 1 was expected.",
        )
    for what, wanted, found in (("network", model, timings.model), ("batch", batch, timings.batch)):
        if wanted != found:
            raise UsageError(
                f"The timings are of the {what} {found}.",
                expected=f"Those of {wanted} were expected.",
                do="Measure again, or plan for what was measured.",
            )


def _rated(product: Product, timed: Mapping[Size, ProductTiming]) -> PlannedLayer:
    """The layer with `sparse` for whether it can be chosen."""
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
    return replace(layer, sparse=False, why="what it saves is not worth its weights under the requirement")
