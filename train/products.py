"""What a run multiplies by in its steps, where its recipe asks for other than dense products."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from sparse_export.formats.run import ProductInfo
from sparse_export.train.csr_choice import choose_products
from sparse_export.train.inputs import ModelInputs
from sparse_export.train.recipe import Recipe
from sparse_export.train.sparsifier import Sparsifier
from sparse_export.train.step24 import Step24, product_facts, products_24
from sparse_export.train.step_csr import StepCsr
from sparse_export.train.stopping import cpu_settings

__all__ = ["Products", "make_products"]

Products = StepCsr | Step24


def make_products(
    recipe: Recipe,
    model: nn.Module,
    sparse: Sparsifier | None,
    sample: Callable[[], ModelInputs],
    *,
    earlier: Sequence[ProductInfo],
    n_threads: int,
    steps_per_epoch: int,
) -> tuple[Products | None, tuple[ProductInfo, ...]]:
    """The products of a run, which change layers of the model in place.

    Args:
        recipe: its `sparsity.products`.
        model: the network.
        sparse: what holds its masks; None for a dense training.
        sample: makes inputs like those of a step in this process.
        earlier: of the record of a run that is resumed, which chooses nothing anew.
        n_threads: of torch, on the CPU.
        steps_per_epoch: after which masks are updated where the recipe says once an epoch.

    Returns:
        The products, None for dense ones everywhere; and what goes on record of them.
    """
    if sparse is None:
        return None, ()
    settings = recipe.sparsity
    if settings.products == "2:4":
        by_24 = products_24(model, sparse, sample(), sparse_backward=settings.transposable)
        return by_24, product_facts(by_24, sparse.masks)
    if settings.products != "csr":
        return None, ()
    facts = tuple(earlier)
    if not facts:
        with cpu_settings(n_threads):
            facts = choose_products(model, sparse.masks, sample())
    layers = [fact.name for fact in facts if fact.by == "csr"]
    if not layers:
        return None, facts
    by_csr = StepCsr(
        model, sparse.csr_trainer(), layers=layers, window=settings.window, update_every=steps_per_epoch
    )
    return by_csr, facts
