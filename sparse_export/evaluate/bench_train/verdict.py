"""What the times of a training step may be said to show, and why, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sparse_export.evaluate.bench_train.result import Phases, StepTimes
from sparse_export.formats.run import ProductInfo
from sparse_export.instruments.outcome import Outcome, doubts, outcome_of
from sparse_export.instruments.statistics import Ratio, resolution
from sparse_export.train.recipe import Recipe

__all__ = ["judge_step"]


def judge_step(
    recipe: Recipe,
    *,
    ratio: Ratio,
    control: Ratio,
    times: Mapping[str, StepTimes],
    update_ms: Sequence[float],
    update_every: int | None,
    device: str,
    products: Sequence[ProductInfo],
    phases: Phases | None,
) -> tuple[Outcome, str]:
    """The outcome, and the sentences that say it and why.

    times: of every network.  update_ms: of one update.  update_every: steps that share one, None where masks do not
    move.  device: its type.
    """
    floor = resolution(control)
    outcome = outcome_of(ratio, floor)
    differ = f"two dense networks differ here by up to {100 * (floor - 1):.1f} %"
    parts = [f"{outcome.capitalize()}: dense / sparse is {ratio}, and {differ}."]
    if phases is not None:
        parts.append(_of_phases(phases, products, update_every))
    else:
        parts += _of_products(products, outcome, device, transposable=recipe.sparsity.transposable)
    if update_every:
        parts.append(
            f"Masks cost {times['sparse'].part_ms['masks']:.3g} ms a step, and an update {np.median(update_ms):.3g} ms "
            f"once in {update_every} steps."
        )
    parts += doubts(control, steady=all(one.latency.steady for one in times.values()))
    if recipe.cuda_graph:
        parts.append(
            "The recipe launches a step as one CUDA graph; these steps were launched kernel by kernel."
        )
    return outcome, " ".join(parts)


def _of_phases(phases: Phases, products: Sequence[ProductInfo], update_every: int | None) -> str:
    n_csr = sum(fact.by == "csr" for fact in products)
    return (
        f"Of {len(products)} masked weights {n_csr} are multiplied without their inactive entries. Steps that "
        f"train active weights alone are {phases.between} as fast as dense ones, and those with dense "
        f"gradients, {phases.window_steps} of {update_every or 'none'}, {phases.within}."
    )


def _of_products(
    products: Sequence[ProductInfo], outcome: Outcome, device: str, *, transposable: bool
) -> list[str]:
    """Of steps of one kind: by which products they are made, and what that lets expect."""
    n_24 = sum(fact.by == "2:4" for fact in products)
    if n_24:
        backward = (
            "and those of their inputs' gradients, by masks that are 2:4 along both axes; gradients of weights are dense."
            if transposable
            else "both gradients are dense."
        )
        return [f"Forward products of {n_24} of {len(products)} masked weights are 2:4, {backward}"]
    if outcome == "speed-up":
        told = ["The products are the same dense ones in both, so this does not come from skipped zeros."]
    else:
        why = "so sparsity takes no work away and masks add theirs"
        told = [
            f"Products are dense on this {device}: a masked weight is multiplied like any other, forward and backward, {why}."
        ]
    if products:
        reasons = "; ".join(f"{fact.name}, {fact.reason}" for fact in products)
        told.append(f"CSR products were asked for, and won for no layer: {reasons}.")
    return told
