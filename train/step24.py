"""A training step by 2:4 products: patterns are compressed when masks move, values gathered each step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from sparse_export.errors import UsageError
from sparse_export.formats.run import ProductInfo
from sparse_export.models.layers24 import (
    Weight24,
    change_layers,
    choose_algorithms,
    restore_layers,
    tune_layers,
)
from sparse_export.sparsity.compressed import TWO_FOUR
from sparse_export.sparsity.pattern import fits, obeys
from sparse_export.sparsity.product24 import Backend, why_not
from sparse_export.sparsity.transposable import is_transposable
from sparse_export.train.inputs import ModelInputs, called, tensors_of

__all__ = ["BACKEND_24", "MovingMasks", "Step24", "product_facts", "products_24"]

BACKEND_24: Backend = "cusparselt"
"""Of the products that a recipe asks for; the only one on every card."""


class MovingMasks(Protocol):
    """What moves masks and holds weights to them, as `SparseTraining` does.

    Attributes:
        masks: bool, by parameter name.
        n_updates: of them so far.
    """

    masks: dict[str, Tensor]
    n_updates: int


def products_24(
    model: nn.Module, trainer: MovingMasks, sample: ModelInputs, *, sparse_backward: bool = False
) -> Step24:
    """The 2:4 products of a recipe: in bfloat16, tuned for inputs like the sample.

    Args:
        model: in training.
        trainer: holds the masks.
        sample: inputs of a step.
        sparse_backward: see `Step24`.

    Raises:
        UsageError, MissingCapability: as `Step24` does.
    """
    products = Step24(
        model, trainer, dtype=torch.bfloat16, backend=BACKEND_24, sparse_backward=sparse_backward
    )
    model.eval()  # no layer is to keep statistics of the sample
    with torch.autocast(tensors_of(sample)[0].device.type, torch.bfloat16):
        products.tune(model, sample)
    model.train()
    return products


def product_facts(products: Step24, masks: Mapping[str, Tensor]) -> tuple[ProductInfo, ...]:
    """How each masked weight is multiplied by, for a run's record."""
    facts = []
    for name, mask in masks.items():
        reason = products.why_dense.get(name)
        facts.append(
            ProductInfo(
                name=name,
                by="dense" if reason else "2:4",
                density=int(torch.count_nonzero(mask)) / mask.numel(),
                n_rows=None,
                dense_ms=None,
                csr_ms=None,
                reason=reason or "the recipe asks for it, from the step on in which its mask is 2:4",
            )
        )
    return tuple(facts)


class FillAtOnce(Protocol):
    """Fills the forms of all layers; False when it cannot, having done nothing."""

    def __call__(self, layers: Sequence[Weight24]) -> bool: ...


class Step24:
    """Makes the products of a network in training 2:4 where its masks allow it.

        trainer = SparseTraining(model, optimizer, pattern="2:4", total_steps=10_000)
        products = Step24(model, trainer)
        ...
        loss.backward()
        trainer.step()
        products.after_step()

    Before the network is wrapped by DistributedDataParallel or compiled: its layers are changed in place.
    Parameters, their names and their gradients stay what they are, gradients of inactive weights included.

    A layer whose masks are not 2:4 yet, while a cap is approached, multiplies densely until they are. The
    gradient of the weight is always dense.

    Args:
        model: on the device that it is trained on.
        masks: weights have to be zero outside them after every step.
        dtype: of the products; autocast to the same type, or none, is expected around the network.
        backend: whose products they are.
        sparse_backward: also compute the gradient of each layer's input by the compressed transpose. Masks
            then have to be 2:4 along both axes, see `sparse_export.sparsity.transposable`.

    Attributes:
        why_dense: the reason for each masked weight whose product stays dense for good.

    Raises:
        UsageError: no layer can be changed.
        MissingCapability: the device has no such product.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: MovingMasks,
        *,
        dtype: torch.dtype = torch.bfloat16,
        backend: Backend = "cusparselt",
        sparse_backward: bool = False,
    ) -> None:
        if not dtype.is_floating_point:
            raise UsageError(
                f"A training step in {str(dtype).removeprefix('torch.')} was asked for.",
                expected="A float type was expected: gradients have to go through the products.",
                do="Train in bfloat16, and use int8 for inference.",
            )
        self.sparse_backward = sparse_backward
        self._model, self._masks = model, masks
        weights = {name: model.get_parameter(name) for name in masks.masks}
        possible, self.why_dense = _possible(weights, dtype, backend, sparse_backward)
        self.layers, reasons = change_layers(model, possible, dtype=dtype, backend=backend)
        self.why_dense |= reasons
        if not self.layers:
            listed = "; ".join(f"{name}: {reason}" for name, reason in self.why_dense.items())
            raise UsageError(
                f"No masked layer can be multiplied as 2:4: {listed or 'there is none'}.",
                expected="At least one was expected.",
                do="Train without 2:4 products.",
            )
        self._seen = -1
        self._fill_at_once = _one_launch(next(iter(self.layers.values())).weight.device)
        self.after_step()
        self._fill()  # now, for the first launch waits for the device

    @property
    def sparse_layers(self) -> tuple[str, ...]:
        """Weights whose products are 2:4 at the moment."""
        return tuple(name for name, layer in self.layers.items() if layer.forward_form is not None)

    @torch.no_grad()
    def after_step(self) -> None:
        """After every change of the weights: compress where masks have moved, and gather the values.

        Makes no host synchronisation while masks stand still. Raises UsageError for masks that
        sparse_backward cannot take.
        """
        if self._masks.n_updates != self._seen:
            self._seen = self._masks.n_updates
            before = [layer for layer in self.layers.values() if layer.forward_form is None]
            for name, layer in self.layers.items():
                self._compress(name, layer, self._masks.masks[name])
            choose_algorithms([layer for layer in before if layer.forward_form is not None])
            return
        self._fill()

    def tune(self, model: nn.Module, x: ModelInputs) -> None:
        """Choose the fastest algorithms for inputs like x, of the network as it was given, not compiled.
        Times the device.

        Runs the network once, forward, as it is: in training, layers that keep statistics take x into them. A
        layer whose mask is not 2:4 yet is tuned when it becomes so.
        """
        tune_layers(model, self.layers, lambda: called(model, x))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Multiply densely, in the type that the network computes in, as long as this lasts."""
        for layer in self.layers.values():
            layer.paused = True
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.paused = False

    def sync(self) -> None:
        """Bring the layers' own weights up to date: they always are."""

    def restore(self) -> None:
        """Make the layers the ordinary ones that they were, for good."""
        restore_layers(self._model)
        self.layers = {}

    def _fill(self) -> None:
        """Gather the values of every layer: by one launch where that can be."""
        sparse = [layer for layer in self.layers.values() if layer.forward_form is not None]
        if self._fill_at_once is None or not sparse or not self._fill_at_once(sparse):
            for layer in sparse:
                layer.fill()

    def _compress(self, name: str, layer: Weight24, mask: Tensor) -> None:
        if not obeys(mask.flatten(1), 1, TWO_FOUR):
            layer.set_mask(None)
            return
        if self.sparse_backward and not is_transposable(mask.flatten(1)):
            raise UsageError(
                f"The mask of {name} is 2:4 along its inputs only.",
                expected="A sparse gradient of the input needs one that is 2:4 along outputs too.",
                do="Leave sparse_backward out, or train with transposable masks.",
            )
        layer.set_mask(mask, sparse_backward=self.sparse_backward)


def _one_launch(device: torch.device) -> FillAtOnce | None:
    """What fills all layers by one launch where that can be had, else None."""
    if device.type != "cuda":
        return None
    try:
        from sparse_export.train.fill_pass import FillPass
    except ImportError:
        return None
    return FillPass()


def _possible(
    weights: Mapping[str, Tensor], dtype: torch.dtype, backend: Backend, sparse_backward: bool
) -> tuple[list[str], dict[str, str]]:
    """Weights that are matrices of four columns, and with sparse_backward whose transposes can be multiplied
    too.
    """
    possible, reasons = [], {}
    for name, weight in weights.items():
        shape = tuple(weight.flatten(1).shape)
        if math.prod(weight.shape[2:]) > 1:
            possible.append(name)  # no product as it is: `change_layers` says so
            continue
        if not fits(shape, 1, TWO_FOUR):
            reasons[name] = f"it has {shape[1]} inputs, and 4 does not divide them"
            continue
        reason = why_not(shape[::-1], dtype, backend) if sparse_backward else None
        if reason is not None:
            reasons[name] = f"transposed, {reason}"
            continue
        possible.append(name)
    return possible, reasons
