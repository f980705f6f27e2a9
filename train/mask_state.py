"""What a sparse training saves of itself beside weights and optimizer, as a dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_export.errors import UsageError
from sparse_export.train.update_schedule import BackOff

__all__ = ["MaskState", "gradients_of", "put_gradients"]

_SHOWN = 4  # differences between saved masks and those of a trainer


@dataclass(frozen=True, kw_only=True)
class MaskState:
    """Masks and the position in the schedule.

    Args:
        masks: bool, by parameter name.
        n_steps, n_updates: so far.
        back_off: of the prune rate.
        last_prune_rate: of the last update; None before the first.
        n_flipped: mask bits that the last update changed; None before the first.
        threshold: of the next update, where pruning goes by one.
        gradients: of the last step, by parameter name, where growth goes by them: an update may come next.
        gradient_sums: of the steps since the last update, by parameter name, where growth goes by them.
    """

    masks: Mapping[str, Tensor]
    n_steps: int
    n_updates: int
    back_off: BackOff
    last_prune_rate: float | None
    n_flipped: int | None
    threshold: float | None
    gradients: Mapping[str, Tensor] | None
    gradient_sums: Mapping[str, Tensor] | None = None

    def table(self) -> dict[str, Any]:
        """Numbers, and mappings from names to tensors."""
        extra: dict[str, Any] = {}
        if self.gradients is not None:
            extra["gradients"] = dict(self.gradients)
        if self.gradient_sums is not None:
            extra["gradient_sums"] = dict(self.gradient_sums)
        if self.threshold is not None:
            extra["threshold"] = self.threshold
        return extra | {
            "masks": dict(self.masks),
            "n_steps": self.n_steps,
            "n_updates": self.n_updates,
            "calm": self.back_off.factor,
            "last_prune_rate": self.last_prune_rate,
            "n_flipped": self.n_flipped,
            "n_flipped_before": self.back_off.n_flipped,
        }

    @classmethod
    def from_table(cls, table: Mapping[str, Any], own: Mapping[str, Tensor]) -> MaskState:
        """The state that a table holds.

        Args:
            table: of `table()`.
            own: masks of the training that it is for.

        Raises:
            UsageError: it belongs to other layers.
        """
        have = {name: tuple(mask.shape) for name, mask in own.items()}
        got = {name: tuple(mask.shape) for name, mask in table["masks"].items()}
        if have != got:
            raise UsageError(
                f"The saved masks are not for the layers of this trainer: {_differences(have, got)}.",
                do="Make the trainer with the network, pattern and keep_dense that it was saved with.",
            )
        rate, n_flipped = table["last_prune_rate"], table["n_flipped"]
        return cls(
            masks=table["masks"],
            n_steps=int(table["n_steps"]),
            n_updates=int(table["n_updates"]),
            back_off=BackOff(factor=float(table["calm"]), n_flipped=int(table["n_flipped_before"])),
            last_prune_rate=None if rate is None else float(rate),
            n_flipped=None if n_flipped is None else int(n_flipped),
            threshold=float(table["threshold"]) if "threshold" in table else None,
            gradients=table.get("gradients"),
            gradient_sums=table.get("gradient_sums"),
        )


def _differences(have: Mapping[str, tuple[int, ...]], got: Mapping[str, tuple[int, ...]]) -> str:
    """Between the shapes of masks of a trainer and of a saved state, the first few."""
    problems = [
        *(f"they lack {name}" for name in have if name not in got),
        *(f"they have {name}, which is not masked here" for name in got if name not in have),
        *(
            f"{name} has shape {got[name]} instead of {have[name]}"
            for name in have
            if name in got and got[name] != have[name]
        ),
    ]
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more


def gradients_of(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of the last step, where there are any, by name."""
    found = {name: value.grad for name, value in parameters.items()}
    return {name: value for name, value in found.items() if value is not None}


def put_gradients(parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
    """Give parameters saved gradients, by name, on their devices and in their memory order."""
    for name, gradient in gradients.items():
        value = parameters[name]
        value.grad = torch.empty_like(value, requires_grad=False).copy_(gradient)
