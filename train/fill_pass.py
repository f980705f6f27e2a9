"""Fills the compressed forms of all layers by one launch, after every step. Needs triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from sparse_export.models.layers24 import Weight24
from sparse_export.sparsity.fill_kernel import FillTiles, GatherAll
from sparse_export.sparsity.product24 import Compressed, values_of

__all__ = ["FillPass"]


Launch = Callable[[], None]


class FillPass:
    """Owns the launch, which is made anew when a tensor moved. Of the two ways there are it takes the faster.

    times_ms: of each way that could be taken, from the first time.
    """

    def __init__(self) -> None:
        self.times_ms: dict[str, float] = {}
        self._way: Way | None = None

    def __call__(self, layers: Sequence[Weight24]) -> bool:
        """Fill; False when these layers cannot be taken by one launch, having done nothing.

        layers: with a forward form each.  Waits for the device the first time, when the ways are timed; never after.
        """
        forward = [form for layer in layers if (form := layer.forward_form) is not None]
        backward = [form for layer in layers if (form := layer.backward_form) is not None]
        if self._way is None:
            ways: dict[str, Way] = {"tiles": ByTiles(), "places": ByPlaces()}
            self.times_ms = {
                name: _milliseconds(launch)
                for name, way in ways.items()
                if (launch := way.launch(layers, forward, backward)) is not None
            }
            if not self.times_ms:
                return False
            self._way = ways[min(self.times_ms, key=lambda name: self.times_ms[name])]
        launch = self._way.launch(layers, forward, backward)
        if launch is None:
            self._way = None
            return False
        launch()
        # Autograd does not see what a kernel of ours writes.
        torch.autograd.graph.increment_version([form.packed for form in (*forward, *backward)])
        return True


class Way(Protocol):
    """A way to fill."""

    def launch(
        self, layers: Sequence[Weight24], forward: list[Compressed], backward: list[Compressed]
    ) -> Launch | None:
        """What fills them, None where this way cannot."""
        ...


class ByTiles:
    """Both forms of a layer from one reading of its weight."""

    def __init__(self) -> None:
        self._kernel: FillTiles | None = None

    def launch(
        self, layers: Sequence[Weight24], forward: list[Compressed], backward: list[Compressed]
    ) -> Launch | None:
        weights = [layer.weight.detach() for layer in layers]
        codes = [form.codes for form in forward if form.codes is not None]
        codes_t = [form.codes for form in backward if form.codes is not None]
        values, values_t = [values_of(form) for form in forward], [values_of(form) for form in backward]
        if (
            len(codes) < len(forward)
            or len(codes_t) < len(backward)
            or len(backward) not in (0, len(forward))
        ):
            return None
        if not FillTiles.can(weights, [*values, *values_t]):
            return None
        tensors = (weights, codes, values, codes_t or None, values_t or None)
        if self._kernel is None or not self._kernel.fits(*tensors):
            self._kernel = FillTiles(*tensors)
        return self._kernel


class ByPlaces:
    """Each form by the places of its values, in whatever order they lie."""

    def __init__(self) -> None:
        self._kernel: GatherAll | None = None

    def launch(
        self, layers: Sequence[Weight24], forward: list[Compressed], backward: list[Compressed]
    ) -> Launch | None:
        forms = [*forward, *backward]
        weights = [layer.weight.detach() for layer in layers]
        weights += [layer.weight.detach() for layer in layers if layer.backward_form is not None]
        tensors = (weights, [form.places for form in forms], [values_of(form) for form in forms])
        if not GatherAll.can(*tensors):
            return None
        if self._kernel is None or not self._kernel.fits(*tensors):
            self._kernel = GatherAll(*tensors)
        return self._kernel


def _milliseconds(launch: Launch) -> float:
    """The least of a few launches, after one that compiles."""
    launch()
    times: list[float] = []
    for _ in range(5):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        launch()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last))
    return min(times)
