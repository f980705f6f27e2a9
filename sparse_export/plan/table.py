"""A layer plan as a table for people."""

from __future__ import annotations

from sparse_export.formats.layer_plan import LayerPlan, PlannedLayer
from sparse_export.tables import Shown, Table

__all__ = ["plan_shown"]


def plan_shown(plan: LayerPlan) -> Shown:
    """The layers of a plan and what is expected of it."""
    title = (
        f"{plan.model or 'a network of your own'} at batch {plan.batch}, {plan.dtype} by {plan.backend} "
        f"on {plan.device}"
    )
    head = ("layer", "outputs x inputs, rows", "", "saves us", "loses %", "why")
    table = Table(head=head, rows=[_row(layer) for layer in plan.layers], right=(1, 3, 4))
    total = (
        f"{len(plan.sparse)} of {len(plan.layers)} layers become 2:4. They save {plan.saved_ms:.3g} of "
        f"{plan.model_ms:.4g} ms, {plan.expected_speedup:.3f}x if single products add up, and cutting them "
        f"takes {100 * plan.lost:.2f} % of the magnitude of all weights ({plan.weights}). Expected from "
        "times of single products, not measured on the whole network."
    )
    return Shown([title, table, total])


def _row(layer: PlannedLayer) -> tuple[str, ...]:
    return (
        layer.name,
        f"{layer.n_outputs} x {layer.n_inputs}, {layer.n_rows if layer.n_rows is not None else '?'}",
        "2:4" if layer.sparse else "dense",
        f"{1e3 * layer.saved_ms:.1f}",
        "-" if layer.lost is None else f"{100 * layer.lost:.2f}",
        layer.why,
    )
