"""A layer plan as a table for people."""

from __future__ import annotations

import textwrap

from sparse_export.formats.layer_plan import LayerPlan

_WIDTH = 98


def plan_table(plan: LayerPlan) -> str:
    """The layers of a plan and what is expected of it, as text."""
    width = max((len(layer.name) for layer in plan.layers), default=5)
    lines = [
        f"{plan.model or 'a network of your own'} at batch {plan.batch}, {plan.dtype} by {plan.backend} on {plan.device}",
        "",
        f"{'layer':<{width}}  {'outputs x inputs, rows':>24}  {'':<6}  {'saves us':>8}  {'loses %':>7}  why",
    ]
    for layer in plan.layers:
        size = f"{layer.n_outputs} x {layer.n_inputs}, {layer.n_rows if layer.n_rows is not None else '?'}"
        lost = "-" if layer.lost is None else f"{100 * layer.lost:.2f}"
        lines.append(
            f"{layer.name:<{width}}  {size:>24}  {'2:4' if layer.sparse else 'dense':<6}  "
            f"{1e3 * layer.saved_ms:>8.1f}  {lost:>7}  {layer.why}"
        )
    total = (
        f"{len(plan.sparse)} of {len(plan.layers)} layers become 2:4. They save {plan.saved_ms:.3g} of "
        f"{plan.model_ms:.4g} ms, {plan.expected_speedup:.3f}x if single products add up, and cutting them takes "
        f"{100 * plan.lost:.2f} % of the magnitude of all weights ({plan.weights}). Expected from times of single "
        "products, not measured on the whole network."
    )
    return "\n".join([*lines, "", *textwrap.wrap(total, _WIDTH)])
