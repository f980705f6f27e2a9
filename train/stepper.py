"""One step of a training run: the gradients of a batch, the weights by them, the masks when it is time."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_export.train.augment import crop_flip, draw_crops
from sparse_export.train.captured import CapturedStep, make_capturable, set_rate
from sparse_export.train.distributed import World
from sparse_export.train.divergence import FiniteNumbers
from sparse_export.train.ema import Ema
from sparse_export.train.inputs import ModelInputs, called, parts_of
from sparse_export.train.loss import loss_of
from sparse_export.train.network import in_memory_format, not_reduced
from sparse_export.train.products import Products
from sparse_export.train.randomness import augmentation_generator, seed_step
from sparse_export.train.rates import learning_rate
from sparse_export.train.recipe import Recipe
from sparse_export.train.sparsifier import Sparsifier
from sparse_export.train.teacher import Teacher

__all__ = ["Stepper"]


class Stepper:
    """Takes the steps of one training run; `step` in its methods counts from 0.

    Make it when states are loaded: it makes the optimizer ready for a CUDA graph.

    Args:
        recipe: of the training.
        model: the network.
        forward: the model, wrapped for training.
        optimizer: over its parameters.
        sparse, ema, products: None where the recipe asks for none.
        device: of this process.
        world: the processes that train together.
        batch_size: over all processes.
        numbers: hold the training to finite numbers.
        teacher: whose outputs are learnt in place of targets; None for the recipe's loss.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        forward: Callable[..., Any],
        optimizer: Optimizer,
        sparse: Sparsifier | None,
        ema: Ema | None,
        products: Products | None,
        *,
        device: torch.device,
        world: World,
        batch_size: int,
        numbers: FiniteNumbers,
        teacher: Teacher | None = None,
    ) -> None:
        self.model, self.optimizer, self.sparse = model, optimizer, sparse
        self.ema, self.products = ema, products
        self._recipe, self._forward = recipe, forward
        self._device, self._world = device, world
        self._batch_size, self._numbers = batch_size, numbers
        self._teacher = teacher
        self._loss = loss_of(recipe, label_smoothing=recipe.label_smoothing)
        self._restart = None if recipe.dense else recipe.sparsity.rule.restart
        self._n_updates_averaged = 0
        make_capturable(optimizer, device if recipe.cuda_graph else None)
        self._captured = CapturedStep(self._whole_step) if recipe.cuda_graph else None

    def step_gradients(self, x: ModelInputs, y: Tensor, step: int) -> Tensor:
        """Forward and backward, and where it is captured the weights' step too.

        Gives this process's part of the batch's mean loss: the parts add up to it.
        """
        recipe = self._recipe
        seed_step(recipe.seed, step, self._world.rank, self._device)
        set_rate(self.optimizer, self._learning_rate(step))
        if recipe.augment == "crop-flip" and isinstance(x, Tensor):  # which alone it is taken for
            crops = draw_crops(self._batch_size, augmentation_generator(recipe.seed, step))
            x = crop_flip(x, self._world.share(crops.T).T)
        x = in_memory_format(recipe, x)
        return self._gradients(x, y) if self._captured is None else self._captured(x, y)

    def step_weights(self, step: int) -> None:
        """Apply the gradients of this step: optimizer step, masks, products and averages."""
        with self._numbers.expected(step):
            if self._captured is None:
                (self.optimizer if self.sparse is None else self.sparse).step()
            elif self.sparse is not None:
                self.sparse.advance()
        if self.products is not None:
            self.products.after_step()
        if self.ema is not None:
            self.ema.step()
            self._mask_average()

    def update_after_epoch(self, epoch: int) -> float | None:
        """Update the masks where the recipe says once an epoch.

        Returns its wall time in ms; None without one.
        """
        sparse = self.sparse
        if sparse is None or not self._is_update_due(sparse, epoch):
            return None
        began = self._now()
        with self._numbers.expected(sparse.n_steps - 1):
            sparse.update()
        if self.products is not None:
            self.products.after_step()
        self._mask_average()
        return 1000 * (self._now() - began)

    def _whole_step(self, x: ModelInputs, y: Tensor) -> Tensor:
        """What a CUDA graph holds: everything of a step but what its number decides."""
        loss = self._gradients(x, y)
        self.optimizer.step()
        if self.sparse is not None:
            self.sparse.apply_masks()
        return loss

    def _gradients(self, x: ModelInputs, y: Tensor) -> Tensor:
        """Gradients of the batch, in the parts that the recipe says, clipped; gives its loss."""
        self.optimizer.zero_grad()
        n_parts = min(self._recipe.accumulate, len(y))
        if n_parts == 1:
            total = self._part(x, y)
        else:
            losses = []
            for place, (own_x, own_y) in enumerate(
                zip(parts_of(x, n_parts), y.tensor_split(n_parts), strict=True), start=1
            ):
                with nullcontext() if place == n_parts else not_reduced(self._forward):
                    losses.append(self._part(own_x, own_y).detach())
            total = torch.stack(losses).sum()
        if self._recipe.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._recipe.grad_clip)
        return total

    def _part(self, x: ModelInputs, y: Tensor) -> Tensor:
        """Add the gradients of samples to those that are there; gives their part of the batch's mean loss."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._recipe.precision == "bf16"):
            if self._teacher is None:
                loss = self._loss(called(self._forward, x), y)
            else:
                loss = self._teacher.loss(x, self._forward, self.model)
        if len(y) != self._batch_size:
            loss = loss * (len(y) / self._batch_size)
        # Gradients are averaged over the processes, which divides by their number.
        (loss if self._world.size == 1 else loss * self._world.size).backward()
        return loss

    def _learning_rate(self, step: int) -> float:
        """The schedule's rate; some methods run through the schedule twice."""
        return learning_rate(*self._place(step), self._recipe.optimizer.lr, self._recipe.learning_rate)

    def _place(self, step: int) -> tuple[int, int]:
        """(step, of how many) in the learning rate's schedule."""
        n_steps = self._numbers.n_steps
        if self._restart is None:
            return step, n_steps
        cut = round(self._restart * n_steps)
        return (step, cut) if step < cut else (step - cut, n_steps - cut)

    def _mask_average(self) -> None:
        """The average holds the past of a weight that was pruned: zero it, once after each mask update."""
        if (
            self.ema is not None
            and self.sparse is not None
            and self.sparse.n_updates != self._n_updates_averaged
        ):
            self.ema.mask(self.sparse.masks)
            self._n_updates_averaged = self.sparse.n_updates

    def _is_update_due(self, sparse: Sparsifier, epoch: int) -> bool:
        return sparse.update_every is None and epoch + 1 < self._recipe.epochs and not sparse.is_frozen

    def _now(self) -> float:
        """Seconds on a monotonic clock, when the device has done what it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.monotonic()
