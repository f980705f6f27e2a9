"""What a training run needs of whatever keeps its network sparse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from sparse_export.formats.run import LayerInfo


class Sparsifier(Protocol):
    """Steps in place of the optimiser, so that the network obeys its masks after every step.

    masks: by parameter name, True = kept.  n_active: of n_masked weights, at the end of the training; density_now:
    at the moment.  update_every: steps between mask updates, None where `update` is called from outside.
    n_updates: of the masks so far.  last_prune_rate, flip_rate: of the last one.  is_frozen: do the masks stand still?
    """

    masks: dict[str, Tensor]
    n_masked: int
    n_active: int
    n_updates: int

    @property
    def density(self) -> float: ...
    @property
    def density_now(self) -> float: ...
    @property
    def update_every(self) -> int | None: ...
    @property
    def is_frozen(self) -> bool: ...
    @property
    def last_prune_rate(self) -> float | None: ...
    @property
    def flip_rate(self) -> float | None: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step the optimiser and what belongs to it."""

    def layer_facts(self) -> tuple[LayerInfo, ...]:
        """Every weight that could be masked, with its active count."""

    def state_dict(self) -> dict[str, Any]:
        """Numbers, and mappings name -> tensor."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
