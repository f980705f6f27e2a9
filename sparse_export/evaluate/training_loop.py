"""One network in training, the parts of whose steps are timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparse_export import models
from sparse_export.errors import UsageError
from sparse_export.evaluate.training_step import PARTS
from sparse_export.formats.run import ProductInfo
from sparse_export.instruments.device import stamps_for
from sparse_export.models.lazy import give_shapes
from sparse_export.models.modes import modes_kept
from sparse_export.train.csr_choice import choose_products
from sparse_export.train.factory import make_sparsifier
from sparse_export.train.inputs import ModelInputs, called, each, n_samples_of
from sparse_export.train.layers import output_layers
from sparse_export.train.loss import Loss, loss_of
from sparse_export.train.network import in_memory_format
from sparse_export.train.optimizer import make_optimizer
from sparse_export.train.recipe import Recipe
from sparse_export.train.sparsifier import Sparsifier
from sparse_export.train.step24 import Step24, product_facts, products_24
from sparse_export.train.step_csr import StepCsr

__all__ = ["Loop", "StepBatch", "fresh_network"]

_TOTAL_STEPS = 10**9  # so long a training that prune rates stay where they start


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """What every step is made with.

    Attributes:
        inputs: on the device.
        targets: likewise; None to draw class numbers.
        is_drawn: the inputs are random, and not samples of the recipe's data.
    """

    inputs: ModelInputs
    targets: Tensor | None = None
    is_drawn: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample; () where there are several inputs."""
        return tuple(self.inputs.shape[1:]) if isinstance(self.inputs, Tensor) else ()


def fresh_network(recipe: Recipe, batch: StepBatch) -> nn.Module:
    """The recipe's network with fresh weights, for samples like those of a batch."""
    network = models.create(recipe.model)
    if isinstance(batch.inputs, Tensor):
        give_shapes(network, batch.shape)
        return network
    two = each(batch.inputs, lambda one: one[:2].cpu())
    try:
        with torch.no_grad(), modes_kept(network):
            called(network.eval(), two)
    except Exception as cause:  # whatever a network raises: some assert, some index
        reason = next(iter(str(cause).splitlines()), type(cause).__name__)
        raise UsageError(
            f"The model {recipe.model} cannot take the inputs {', '.join(batch.inputs)} of {recipe.data}: "
            f"{reason.rstrip('.')}.",
            do="Choose another model or data set.",
        ) from cause
    return network


class Loop:
    """One network in training, and the times of the parts of its steps."""

    def __init__(
        self,
        recipe: Recipe,
        sparse: bool,
        device: torch.device,
        batch: StepBatch,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        self.stamps = stamps_for(device.type)
        self.update_ms: list[float] = []
        self._marks: list[tuple[Any, ...]] = []
        self._inside: list[Any] = []
        self._recipe, self._device = recipe, device
        self._x = in_memory_format(recipe, batch.inputs)
        model = fresh_network(recipe, batch).to(device)
        if recipe.channels_last:
            model = model.to(memory_format=torch.channels_last)
        model.eval()
        outputs: list[Any] = []
        two = each(self._x, lambda one: one[:2])
        with torch.no_grad():
            last = output_layers(model, lambda: outputs.append(called(model, two)))
        n = n_samples_of(self._x)
        self._loss: Loss = partial(nn.functional.cross_entropy, label_smoothing=recipe.label_smoothing)
        if batch.targets is None:
            self._y = torch.randint(outputs[0].shape[-1], (n,), device=device)
        else:
            self._y, self._loss = batch.targets, loss_of(recipe, label_smoothing=recipe.label_smoothing)
        model.train()
        self._optimizer = make_optimizer(recipe.optimizer, model)
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0
        self._sparse: Sparsifier | None = None
        self._products: StepCsr | None = None
        if sparse:
            self._sparse = make_sparsifier(recipe, model, self._optimizer, _TOTAL_STEPS, output_layers=last)
            self._sparse.update_every = None  # updates are timed apart
        self._model = model
        self._products_24: Step24 | None = None
        if self._sparse is not None and recipe.sparsity.products == "2:4":
            self._products_24 = products_24(
                model, self._sparse, self._x, sparse_backward=recipe.sparsity.transposable
            )
        self._optimizer.register_step_pre_hook(lambda *_: self._inside.append(self.stamps.now()))
        self._optimizer.register_step_post_hook(lambda *_: self._inside.append(self.stamps.now()))
        compiled: Any = torch.compile(model) if recipe.compile else model
        self._forward: Callable[..., Any] = compiled

    @property
    def density(self) -> float:
        return self._sparse.density_now if self._sparse else 1.0

    def step(self) -> None:
        now = self.stamps.now
        self._inside.clear()
        begin = now()
        self._optimizer.zero_grad()
        zeroed = now()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._recipe.precision == "bf16"):
            loss = self._loss(called(self._forward, self._x), self._y)
        lost = now()
        loss.backward()
        back = now()
        if self._sparse is None:
            self._optimizer.step()
        else:
            self._sparse.step()
        if self._products_24 is not None:
            self._products_24.after_step()
        self._marks.append((begin, zeroed, lost, back, *self._inside, now()))

    @property
    def by_24(self) -> tuple[ProductInfo, ...]:
        """The masked weights, by 2:4 products or why not; none where the recipe does not ask for them."""
        if self._products_24 is None or self._sparse is None:
            return ()
        return product_facts(self._products_24, self._sparse.masks)

    def forget(self) -> None:
        """Drop the marks of the warm-up."""
        self._marks.clear()

    def choose(self) -> tuple[ProductInfo, ...]:
        """What products win for each masked weight, timed as training does at its start."""
        assert self._sparse is not None
        return choose_products(self._model, self._sparse.masks, self._x)

    def multiply_by(self, products: Sequence[ProductInfo], window: int | None, every: int) -> None:
        """Take the chosen products, with whole weights in training."""
        assert self._sparse is not None
        layers = [product.name for product in products if product.by == "csr"]
        trainer = self._sparse.csr_trainer()
        self._products = StepCsr(self._model, trainer, layers=layers, window=window, update_every=every)
        self._products.widen()

    def narrow(self) -> None:
        """Train active weights alone from now on."""
        assert self._products is not None
        self._products.narrow()

    @property
    def window_steps(self) -> int:
        return self._products.window if self._products else 0

    def update(self) -> None:
        """Update the masks, timed by the host, where this method lets them be updated from outside.

        Where active weights are trained alone: from there and back again, which is all that an interval
        changes. Where products are 2:4: with the compression of the new patterns.
        """
        if self._sparse is not None and self._sparse.moves_at_updates:
            self.stamps.wait()
            watch = stamps_for("cpu")
            begin = watch.now()
            self._sparse.update()
            if self._products is not None:
                self._products.after_step()
                self._products.narrow()
            if self._products_24 is not None:
                self._products_24.after_step()  # compresses the new patterns
            self.stamps.wait()
            self.update_ms.append(1e3 * watch.seconds(begin, watch.now()))

    def part_ms(self) -> dict[str, float]:
        """Mean ms of each part. Marks: begin, gradients zeroed, loss, backward, optimiser in and out, end."""
        self.stamps.wait()
        gaps = np.array([[self.stamps.seconds(a, b) for a, b in pairwise(marks)] for marks in self._marks])
        zero, forward, backward, before, optimizer, after = 1e3 * gaps.T
        parts = (forward, backward, zero + optimizer, before + after)
        return {name: float(values.mean()) for name, values in zip(PARTS, parts, strict=True)}
