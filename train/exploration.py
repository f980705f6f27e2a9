"""What a sparse training has tried, and how dense it was: every weight that was ever active, and the mean
density of each layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Exploration"]


class Exploration:
    """Follows the masks of a training.

    On an accelerator nothing here waits for the device but `share`, `mean_densities` and `table`.

    Args:
        masks: that the training starts with: bool, by parameter name.

    Attributes:
        ever: bool, by parameter name; True where a weight was active at some time.

    Source of the share: Liu et al. 2021, "Do we actually need dense over-parameterization? In-time
    over-parameterization in sparse training", section 3, where it is called R_s.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self.ever = {name: mask.clone() for name, mask in masks.items()}
        self._n_active = _counts(masks)
        self._active_steps = torch.zeros_like(self._n_active)
        self._since = 0
        self._is_whole = True

    def moved(self, masks: Mapping[str, Tensor], step: int) -> None:
        """Note masks that have just been changed, after `step` optimizer steps."""
        self._active_steps = self._sums(step)
        self._since = step
        self._n_active = _counts(masks)
        for name, mask in masks.items():
            self.ever[name] |= mask

    def share(self) -> float | None:
        """Weights that were ever active / all of them, 0 to 1; None where a part of the past is not known."""
        if not self._is_whole:
            return None
        n_weights = sum(mask.numel() for mask in self.ever.values())
        return int(_counts(self.ever).sum()) / n_weights

    def mean_densities(self, step: int) -> dict[str, float] | None:
        """Active / all weights of each layer, the mean over `step` optimizer steps.

        None where a part of the past is not known.
        """
        if not self._is_whole:
            return None
        sums = self._sums(step) if step else self._n_active
        return {
            name: total / (max(step, 1) * self.ever[name].numel())
            for name, total in zip(self.ever, sums.tolist(), strict=True)
        }

    def table(self, step: int) -> dict[str, Any]:
        """What a later process goes on with: numbers, and mappings from names to tensors."""
        if not self._is_whole:
            return {}
        return {"ever": dict(self.ever), "active_steps": self._sums(step).tolist()}

    def take_over(self, table: Mapping[str, Any], masks: Mapping[str, Tensor], step: int) -> None:
        """Go on from a saved table, which may be of a version that did not follow the masks.

        Args:
            table: of `table()`, other entries may stand beside it.
            masks: of that moment.
            step: optimizer steps done then.
        """
        self._since = step
        self._n_active = _counts(self.ever).new_tensor(_counts(masks).tolist())
        self._is_whole = "ever" in table
        if self._is_whole:
            for name, ever in self.ever.items():
                ever.copy_(table["ever"][name])
            self._active_steps = self._n_active.new_tensor(table["active_steps"])

    def _sums(self, step: int) -> Tensor:
        """Active weights of each layer, summed over steps: int64 (L,)."""
        return self._active_steps + self._n_active * (step - self._since)


def _counts(masks: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([torch.count_nonzero(mask) for mask in masks.values()])
