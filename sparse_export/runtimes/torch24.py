"""Runs a torch network with 2:4 products: wherever torch runs on an NVIDIA card, without an engine.

With the backend `reference` all but the product itself is tested on the CPU; docs/benchmarks.md has times on
an H100.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_export.errors import UsageError
from sparse_export.models.layers24 import Weight24, change_layers, tune_layers
from sparse_export.runtimes.session import BaseSession, only_array
from sparse_export.signature import Array, Feeds, Signature
from sparse_export.sparsity.compressed import TWO_FOUR
from sparse_export.sparsity.pattern import fits, groups_over
from sparse_export.sparsity.product24 import Backend

__all__ = ["Rewritten", "Torch24Session", "rewrite"]


@dataclass(frozen=True, kw_only=True)
class Rewritten:
    """A network in evaluation mode whose products are 2:4 where they can be.

    Attributes:
        layers: forms by the name of their weight.
        why_dense: the reason for each other Linear, convolution and attention projection.
    """

    model: nn.Module
    layers: dict[str, Weight24]
    why_dense: dict[str, str]

    def tune(self, x: Tensor) -> None:
        """Choose the fastest algorithm of each layer for inputs of this size. Times the device."""
        with torch.inference_mode():
            tune_layers(self.model, self.layers, lambda: self.model(x))


def rewrite(
    model: nn.Module,
    *,
    dtype: torch.dtype,
    backend: Backend,
    only: Collection[str] | None = None,
    product_dtype: torch.dtype | None = None,
) -> Rewritten:
    """Turn a network into one with 2:4 products, in place: cast, in evaluation mode, without gradients.

    Args:
        model: on the device to run on; for 1x1 convolutions best in channels_last.
        dtype: of weights and activations.
        only: weights to multiply as 2:4, as a plan names them; None for all that are 2:4. Nothing is pruned:
            a weight that is not 2:4 along its inputs stays dense, with the reason.
        product_dtype: of the 2:4 products, by default `dtype`; int8 quantizes each weight by outputs and
            activations by rows at every call, without calibration, so accuracy is to be measured.

    Raises:
        UsageError: an unknown name in `only`.
        MissingCapability: the device has no such product.
    """
    model = model.eval().to(dtype).requires_grad_(False)
    weights = {
        name: value
        for name, value in model.named_parameters()
        if value.ndim > 1 and value.is_floating_point()
    }
    unknown = sorted(set(only or ()) - set(weights))
    if unknown:
        raise UsageError(
            f"The network has no weight {unknown[0]!r}.",
            expected="Names of its weights were expected.",
            do="Make the plan for this very network.",
        )
    masks: dict[str, Tensor] = {}
    reasons: dict[str, str] = {}
    for name, weight in weights.items():
        reason = "the plan leaves it dense" if only is not None and name not in only else _not_24(weight)
        if reason is None:
            masks[name] = weight != 0
        else:
            reasons[name] = reason
    layers, refused = change_layers(model, masks, dtype=product_dtype or dtype, backend=backend)
    for name, layer in layers.items():
        layer.set_mask(masks[name])
    return Rewritten(model=model, layers=layers, why_dense=reasons | refused)


def _not_24(weight: Tensor) -> str | None:
    """Why a weight is not 2:4 along its inputs; None when it is."""
    if math.prod(weight.shape[2:]) > 1:
        return None  # no product as it is, whatever its zeros: `change_layers` says so
    matrix = weight.flatten(1)
    shape = tuple(matrix.shape)
    if not fits(shape, 1, TWO_FOUR):
        return f"it has {shape[1]} inputs, and 4 does not divide them"
    n_over = int(groups_over(matrix, 1, TWO_FOUR))
    if n_over:
        return f"{n_over:,} of its {matrix.numel() // 4:,} groups of four have more than 2 nonzeros"
    return None


class Torch24Session(BaseSession):
    """A rewritten network behind the one interface of all runtimes. Owns the network until `close`.

    signature: of the network, with one input and one output of floats.  compiled: by torch.compile, for
    inputs of changing sizes anew.
    """

    def __init__(self, rewritten: Rewritten, signature: Signature, *, compiled: bool = False) -> None:
        first = next(rewritten.model.parameters())
        super().__init__(f"torch24-{first.device.type}", signature)
        self._device, self._computed_in = first.device, first.dtype
        self._call: Any = torch.compile(rewritten.model) if compiled else rewritten.model

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        x = only_array(feeds, "the caller")
        with torch.inference_mode():
            y: Tensor = self._call(torch.from_numpy(x).to(self._device, self._computed_in))
        return {self.signature.outputs[0].name: y.float().cpu().numpy()}

    def _free(self) -> None:
        self._call = None
