"""Fills the compressed forms of all layers by one launch, after every step. Needs triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparse_export.models.layers24 import Weight24
from sparse_export.sparsity.fill_kernel import GatherAll
from sparse_export.sparsity.product24 import values_of

__all__ = ["FillPass"]


class FillPass:
    """Owns the launch, which is made anew when a tensor moved."""

    def __init__(self) -> None:
        self._kernel: GatherAll | None = None

    def __call__(self, layers: Sequence[Weight24]) -> bool:
        """Fill; False when these layers cannot be taken by one launch, having done nothing.

        layers: with a forward form each.  Makes no host synchronisation once the launch is there.
        """
        pairs = [
            (layer.weight.detach(), form)
            for layer in layers
            for form in (layer.forward_form, layer.backward_form)
            if form is not None
        ]
        tensors = (
            [weight for weight, _ in pairs],
            [form.places for _, form in pairs],
            [values_of(form) for _, form in pairs],
        )
        if not GatherAll.can(*tensors):
            return False
        if self._kernel is None or not self._kernel.fits(*tensors):
            self._kernel = GatherAll(*tensors)
        self._kernel()
        # Autograd does not see what a kernel of ours writes.
        torch.autograd.graph.increment_version([form.packed for _, form in pairs])
        return True
