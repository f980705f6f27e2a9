"""Sets the inactive weights of all layers to zero, after every step of the optimizer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_export.errors import UsageError


class MaskPass:
    """Owns the masks of a network in the form in which they are applied.

    On CUDA they are applied by one launch for all layers, which needs triton, and no weight costs more than
    one byte. On the CPU a float copy is kept beside them, because multiplying by bool costs five times as
    much there.

    Args:
        weights: of one device, by name.
        masks: bool, of the same names and shapes, on any device.

    Attributes:
        masks: bool tensors by name, on the weights' device, with their strides; they are overwritten in
            place, so that a captured CUDA graph goes on reading the same memory.
    """

    def __init__(self, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        self._weights: list[Tensor] = list(weights.values())
        self.masks = {
            name: torch.empty_like(weight, dtype=torch.bool, requires_grad=False)
            for name, weight in weights.items()
        }
        self._on_cpu = self._weights[0].device.type == "cpu"
        self._multipliers = [
            torch.empty_like(weight, requires_grad=False) if self._on_cpu else mask
            for weight, mask in zip(self._weights, self.masks.values(), strict=True)
        ]
        self._applied: tuple[list[Tensor], list[Tensor]] = (self._weights, self._multipliers)
        self._kernel: Any = None
        self._kernel_class = None if self._on_cpu else _kernel_class(self._weights)
        self.set(masks)

    @torch.no_grad()
    def set(self, masks: Mapping[str, Tensor]) -> None:
        """Overwrite the masks. Applies nothing."""
        for (name, mask), multiplier in zip(self.masks.items(), self._multipliers, strict=True):
            mask.copy_(masks[name])
            if multiplier is not mask:
                multiplier.copy_(masks[name])

    def rest(self, names: Collection[str]) -> None:
        """Leave these weights, and no others, out of `apply`.

        Only on the CPU, where every weight costs time.
        """
        assert self._on_cpu
        pairs = [
            pair
            for name, *pair in zip(self.masks, self._weights, self._multipliers, strict=True)
            if name not in names
        ]
        self._applied = ([weight for weight, _ in pairs], [multiplier for _, multiplier in pairs])

    @property
    def rests_none(self) -> bool:
        """Is no weight left out of `apply`?"""
        return len(self._applied[0]) == len(self._weights)

    @torch.no_grad()
    def apply(self) -> None:
        """Zero the inactive weights in place. Makes no host synchronisation.

        Under torch.compile the compiler fuses the plain form itself.
        """
        if self._kernel_class is None or torch.compiler.is_compiling():
            if self._applied[0]:
                torch._foreach_mul_(*self._applied)
            return
        if self._kernel is None or not self._kernel.fits(self._weights, self._multipliers):
            self._kernel = self._kernel_class(self._weights, self._multipliers)
        self._kernel()


def weights_of_copy(copy: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """The weights of a copy of a network: compiled, or in a wrapper's `module` as those of averages are.

    Args:
        copy: the copy.
        names: of the weights in the network itself.

    Raises:
        UsageError: it has no weight of one of the names.
    """
    have = {name.replace("_orig_mod.", ""): value for name, value in copy.named_parameters()}
    missing = [name for name in names if name not in have and f"module.{name}" not in have]
    if missing:
        raise UsageError(
            f"{type(copy).__name__} has no weight {missing[0]}.",
            expected="A copy of the network was expected.",
        )
    return {name: have[name if name in have else f"module.{name}"].detach() for name in names}


@torch.no_grad()
def zero_inactive(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Zero weights in place where masks are off, on whatever device they are."""
    for name, weight in weights.items():
        weight.masked_fill_(~masks[name].to(weight.device), 0)


def _kernel_class(weights: Sequence[Tensor]) -> Any:
    """The one-launch kernel where it can be had for these weights, else None."""
    if weights[0].device.type != "cuda" or len({weight.dtype for weight in weights}) > 1:
        return None
    if not all(_is_dense(weight) for weight in weights):
        return None
    try:
        from sparse_export.train.mask_kernel import ZeroInactive
    except ImportError:
        return None
    return ZeroInactive


def _is_dense(tensor: Tensor) -> bool:
    """Does it fill its memory without gaps or overlap, in any order of axes? empty_like keeps that."""
    reach = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size > 1 and stride != reach:
            return False
        reach *= size
    return True
