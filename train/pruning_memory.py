"""A weight's history in pruning: its magnitude averaged over past mask updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["PruningMemory"]


class PruningMemory:
    """Remembers magnitudes from update to update.

    Of a weight that survived the last update it gives decay * (what it gave then) + (1 - decay) * |weight|,
    of one that was grown since |weight|: a weight that was large for long is not pruned for one bad moment.

    Args:
        decay: share of the past, from 0, which forgets it, to below 1.
        parameters: whose magnitudes they are, by name.
    """

    def __init__(self, decay: float, parameters: Mapping[str, Tensor]) -> None:
        self._decay, self._parameters = decay, parameters
        self._past: dict[str, Tensor] = {}

    @torch.no_grad()
    def magnitudes(self) -> dict[str, Tensor]:
        """What pruning goes by now: float, by name, in the weights' shapes."""
        now = {name: value.detach().abs() for name, value in self._parameters.items()}
        for name, past in self._past.items():
            mixed = self._decay * past + (1 - self._decay) * now[name]
            now[name] = torch.where(past > 0, mixed, now[name])
        return now

    def keep(self, magnitudes: Mapping[str, Tensor], survived: Mapping[str, Tensor]) -> None:
        """Remember what an update went by.

        Args:
            magnitudes: of `magnitudes()`, before the update.
            survived: bool, by name: active before the update and after it.
        """
        if self._decay:
            self._past = {name: value * survived[name] for name, value in magnitudes.items()}

    def table(self) -> dict[str, Any]:
        """What a later process goes on with; empty where nothing is remembered."""
        return {"magnitudes": dict(self._past)} if self._past else {}

    def take_over(self, table: Mapping[str, Any]) -> None:
        """Go on from a saved table; other entries may stand beside its own."""
        self._past = {
            name: value.to(self._parameters[name].device)
            for name, value in table.get("magnitudes", {}).items()
        }
