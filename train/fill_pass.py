"""Fills the compressed forms of all layers by one launch, after every step. Needs triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_export.models.layers24 import Weight24
from sparse_export.sparsity.fill_kernel import FillTiles, GatherAll
from sparse_export.sparsity.product24 import Compressed, values_of

__all__ = ["FillPass"]


class FillPass:
    """Owns the launch, which is made anew when a tensor moved."""

    def __init__(self) -> None:
        self._tiles: FillTiles | None = None
        self._gather: GatherAll | None = None

    def __call__(self, layers: Sequence[Weight24]) -> bool:
        """Fill; False when these layers cannot be taken by one launch, having done nothing.

        layers: with a forward form each.  Makes no host synchronisation once the launch is there.
        """
        forward = [form for layer in layers if (form := layer.forward_form) is not None]
        backward = [form for layer in layers if (form := layer.backward_form) is not None]
        weights = [layer.weight.detach() for layer in layers]
        done = self._by_tiles(weights, forward, backward) or self._by_places(
            [*weights, *(layer.weight.detach() for layer in layers if layer.backward_form is not None)],
            [*forward, *backward],
        )
        if done:  # autograd does not see what a kernel of ours writes
            torch.autograd.graph.increment_version([form.packed for form in (*forward, *backward)])
        return done

    def _by_tiles(self, weights: list[Tensor], forward: list[Compressed], backward: list[Compressed]) -> bool:
        codes = [form.codes for form in forward if form.codes is not None]
        codes_t = [form.codes for form in backward if form.codes is not None]
        values, values_t = [values_of(form) for form in forward], [values_of(form) for form in backward]
        if (
            len(codes) < len(forward)
            or len(codes_t) < len(backward)
            or len(backward) not in (0, len(forward))
        ):
            return False
        if not FillTiles.can(weights, [*values, *values_t]):
            return False
        tensors = (weights, codes, values, codes_t or None, values_t or None)
        if self._tiles is None or not self._tiles.fits(*tensors):
            self._tiles = FillTiles(*tensors)
        self._tiles()
        return True

    def _by_places(self, weights: list[Tensor], forms: list[Compressed]) -> bool:
        tensors = (weights, [form.places for form in forms], [values_of(form) for form in forms])
        if not GatherAll.can(*tensors):
            return False
        if self._gather is None or not self._gather.fits(*tensors):
            self._gather = GatherAll(*tensors)
        self._gather()
        return True
