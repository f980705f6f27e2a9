"""SR-STE: masks that follow the magnitude of dense weights, which go on training behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sparse_export.errors import UsageError
from sparse_export.formats.run import LayerInfo
from sparse_export.sparsity import NMPattern
from sparse_export.sparsity.caps import under_cap
from sparse_export.sparsity.eligible import SMALL_SHARE
from sparse_export.train.layers import layer_facts, unwrapped
from sparse_export.train.pattern_plan import plan_pattern


class SrSte:
    """Trains a network to an N:M pattern by the straight-through estimator with a decay of what is masked.

    In place of the optimiser's step, as `SparseTraining`. Between steps the network holds the masked weights, so what
    is tested or saved obeys the pattern. A step takes the gradient at these, puts the dense weights back, adds
    decay * weight to the gradient of every masked one, steps the optimiser, and masks anew: of each group the N of
    largest |weight|.

    decay: lambda of the paper, 2e-4.  keep_dense, output_layers, small_share: as for `SparseTraining`.
    Source: Zhou et al. 2021, "Learning N:M fine-grained structured sparse neural networks from scratch", equation 9.
    Where several processes train together, each draws the masks from its own weights, which are the same bits as long
    as gradients are averaged alike; they are not compared after every step, as those of `SparseTraining` are after
    every update. On purpose different: groups run along input channels, as hardware has them. Raises UsageError.
    """

    update_every = 1
    last_prune_rate = 0.0
    is_frozen = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        pattern: NMPattern,
        decay: float = 2e-4,
        keep_dense: Sequence[str] = (),
        output_layers: Sequence[str] | None = None,
        small_share: float = SMALL_SHARE,
    ) -> None:
        if not decay >= 0:
            raise UsageError(f"decay is {decay}.", expected="A number of at least 0 was expected.")
        self.model, self.optimizer = unwrapped(model), optimizer
        self._plan = plan_pattern(
            pattern, self.model, keep_dense=keep_dense, outputs=output_layers, small_share=small_share
        )
        self._decay = decay
        self._parameters = {name: self.model.get_parameter(name) for name in self._plan.caps}
        self._dense = {name: value.detach().clone() for name, value in self._parameters.items()}
        self.masks = {name: torch.ones_like(value, dtype=torch.bool) for name, value in self._dense.items()}
        self._all = {name: mask.clone() for name, mask in self.masks.items()}
        self.n_masked = sum(value.numel() for value in self._dense.values())
        self.n_active = self._plan.capacity_with(pattern.n)
        self.density = self.density_now = self.n_active / self.n_masked
        self.n_steps = self.n_updates = 0
        self.flip_rate: float | None = None
        self._mask()

    @torch.no_grad()
    def _mask(self) -> None:
        """Draw the masks from the dense weights, and leave in the network what they keep."""
        n_flipped = 0
        for name, value in self._parameters.items():
            mask = under_cap(self._dense[name], self._all[name], self._plan.caps[name])
            n_flipped += int(torch.count_nonzero(mask ^ self.masks[name]))
            self.masks[name].copy_(mask)
            value.copy_(self._dense[name] * mask)
        self.flip_rate = n_flipped / self.n_masked

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step the optimiser on the dense weights, then mask them. Raises UsageError for a closure.

        A closure would compute gradients at the dense weights, where this method wants them at the masked ones.
        """
        if closure is not None:
            raise UsageError(
                "SR-STE takes no closure.", expected="Gradients were expected to be there already."
            )
        with torch.no_grad():
            for name, value in self._parameters.items():
                value.copy_(self._dense[name])
                if value.grad is not None:
                    value.grad.add_(value * ~self.masks[name], alpha=self._decay)
        self.optimizer.step()
        for name, value in self._parameters.items():
            self._dense[name].copy_(value.detach())
        self._mask()
        self.n_steps += 1
        self.n_updates += 1
        return None

    def layer_facts(self) -> tuple[LayerInfo, ...]:
        """Every weight that could be masked, with its active count."""
        promised = dict.fromkeys(self.masks, str(self._plan.pattern))
        return layer_facts(self.model, self.masks, promised, self._plan.why_dense)

    def state_dict(self) -> dict[str, Any]:
        """Masks, the dense weights, and the position; what is masked in the network is not all there is."""
        return {
            "masks": dict(self.masks),
            "dense": dict(self._dense),
            "n_steps": self.n_steps,
            "n_updates": self.n_updates,
            "flip_rate": self.flip_rate,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state. Raises KeyError or RuntimeError when it is another network's."""
        for name, value in self._dense.items():
            value.copy_(state["dense"][name])
        self._mask()
        self.n_steps, self.n_updates = int(state["n_steps"]), int(state["n_updates"])
        self.flip_rate = state["flip_rate"]
