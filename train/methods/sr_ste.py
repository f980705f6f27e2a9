"""SR-STE: masks follow the magnitude of dense weights, which go on training behind them.

Prune: in every step, in each group of M the smallest |weight|, down to N. Growth: whatever becomes large
enough again, for the dense weight of a masked entry is trained by the gradient at the masked weights, and
decays.

Source: Zhou et al. 2021, "Learning N:M fine-grained structured sparse neural networks from scratch", equation
9. On purpose different: groups run along input channels, as hardware has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim import Optimizer

from sparse_export.errors import UsageError
from sparse_export.formats.run import LayerInfo
from sparse_export.sparsity import NMPattern
from sparse_export.sparsity.caps import under_cap
from sparse_export.sparsity.eligible import SMALL_SHARE
from sparse_export.train.layers import layer_facts, unwrapped
from sparse_export.train.methods.method import NO_CHOICE, RATE_KEYS, START_KEYS, Accepts, Method
from sparse_export.train.pattern_plan import plan_pattern

__all__ = ["SR_STE", "SrSte"]


class SrSte:
    """Trains a network to an N:M pattern by the straight-through estimator with a decay of what is masked.

    It stands in place of the optimizer's step, as `SparseTraining` does. Between steps the network holds the
    masked weights, so what is tested or saved has the pattern. A step takes the gradient at these, puts the
    dense weights back, adds decay * weight to the gradient of every masked one, steps the optimizer, and
    masks anew: of each group the N of largest |weight|.

    Where several processes train together, each draws the masks from its own weights, which are the same bits
    as long as gradients are averaged alike; they are not compared after every step, as those of
    `SparseTraining` are after every update.

    Args:
        model: on the device that it is trained on.
        optimizer: over its parameters.
        pattern: N:M.
        decay: lambda of the paper, at least 0.
        keep_dense, output_layers, small_share, unfit: as for `SparseTraining`.

    Raises:
        UsageError: decay is negative, or no layer can take the pattern.
    """

    update_every: int | None = 1
    last_prune_rate = 0.0
    is_frozen = False
    moves_at_updates = False

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
        unfit: Mapping[str, str] | None = None,
    ) -> None:
        if not decay >= 0:
            raise UsageError(f"decay is {decay}.", expected="A number of at least 0 was expected.")
        self.model, self.optimizer = unwrapped(model), optimizer
        self._plan = plan_pattern(
            pattern,
            self.model,
            keep_dense=keep_dense,
            outputs=output_layers,
            small_share=small_share,
            unfit=unfit,
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
        self._ever: dict[str, torch.Tensor] | None = {name: mask.clone() for name, mask in self.masks.items()}

    @property
    def rule(self) -> Method:
        """What the method decides."""
        return SR_STE

    @property
    def explored(self) -> float | None:
        """Weights that were ever active / masked weights. Reads from the device."""
        if self._ever is None:
            return None
        return sum(int(torch.count_nonzero(mask)) for mask in self._ever.values()) / self.n_masked

    @property
    def mean_densities(self) -> dict[str, float]:
        """The density of each layer, which is that of the pattern in every step."""
        return {name: int(torch.count_nonzero(mask)) / mask.numel() for name, mask in self.masks.items()}

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

    def update(self) -> None:
        """Draw the masks anew from the dense weights."""
        self._mask()
        for name, mask in (self._ever or {}).items():
            mask |= self.masks[name]
        self.n_updates += 1

    @torch.no_grad()
    def apply_masks(self) -> None:
        """Set the inactive weights to zero."""
        for name, value in self._parameters.items():
            value.copy_(self._dense[name] * self.masks[name])

    def advance(self) -> None:
        """Take over the network's weights as the dense ones, mask them and count the step."""
        for name, value in self._parameters.items():
            self._dense[name].copy_(value.detach())
        self.update()
        self.n_steps += 1

    def csr_trainer(self) -> NoReturn:
        """Products without inactive weights are for masks that move at updates. Raises UsageError."""
        raise UsageError(
            "CSR products were asked for under a pattern.",
            expected="Masks without a pattern, which do not start dense, were expected.",
        )

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step the optimizer on the dense weights, then mask them.

        Args:
            closure: None. It would compute gradients at the dense weights, where this method needs them at
                the masked ones.

        Raises:
            UsageError: a closure is given.
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
        self.advance()
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
            **({} if self._ever is None else {"ever": dict(self._ever)}),
            "n_steps": self.n_steps,
            "n_updates": self.n_updates,
            "flip_rate": self.flip_rate,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state. Raises KeyError or RuntimeError when it is another network's."""
        for name, value in self._dense.items():
            value.copy_(state["dense"][name])
        self._mask()
        saved = state.get("ever")  # a state of an earlier version has none
        self._ever = (
            None if saved is None else {name: saved[name].to(mask) for name, mask in self.masks.items()}
        )
        self.n_steps, self.n_updates = int(state["n_steps"]), int(state["n_updates"])
        self.flip_rate = state["flip_rate"]


SR_STE = Method(
    name="sr-ste",
    sparsifier=SrSte,
    moves_every_step=True,
    accepts=Accepts(
        **NO_CHOICE,
        freeze=False,
        no_freeze="sets freeze and approach itself",
        pattern="must",
        transposable=False,
        products=("dense",),
        own_loop=False,
        unread=(*RATE_KEYS, *START_KEYS, "history", "update_every"),
    ),
)
