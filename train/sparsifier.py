"""What a training run needs of whatever keeps its network sparse."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_export.formats.run import LayerInfo
from sparse_export.train.methods.method import Method

__all__ = ["CsrTrainer", "Sparsifier"]


class Sparsifier(Protocol):
    """Steps in place of the optimizer, so that inactive weights are zero after every step.

    Attributes:
        masks: bool, by parameter name; True = kept.
        n_masked: weights in masked layers.
        n_active: of these, at the end of the training.
        n_steps, n_updates: steps, and changes of the masks, so far.
        density: kept / total that is wanted.
        density_now: kept / total at the moment.
        update_every: steps between mask updates; None where `update` is called from outside.
        is_frozen: do the masks stand still from now on?
        moves_at_updates: do masks move at updates only, which `update` can ask for?
        last_prune_rate, flip_rate: of the last update; None before the first.
        rule: what the method decides.
        explored: weights that were ever active / all that may be masked; None where that is not known.
        mean_densities: of each layer over the steps so far, by parameter name; None where not known.
    """

    masks: dict[str, Tensor]
    n_masked: int
    n_active: int
    n_updates: int
    update_every: int | None

    @property
    def n_steps(self) -> int: ...
    @property
    def density(self) -> float: ...
    @property
    def density_now(self) -> float: ...
    @property
    def is_frozen(self) -> bool: ...
    @property
    def moves_at_updates(self) -> bool: ...
    @property
    def last_prune_rate(self) -> float | None: ...
    @property
    def flip_rate(self) -> float | None: ...
    @property
    def rule(self) -> Method: ...
    @property
    def explored(self) -> float | None: ...
    @property
    def mean_densities(self) -> dict[str, float] | None: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step the optimizer and what belongs to it."""

    def apply_masks(self) -> None:
        """Set the inactive weights to zero."""

    def advance(self) -> None:
        """Count a step of the optimizer whose masks were applied, and update the masks when it is time."""

    def update(self) -> object:
        """Update the masks now."""

    def csr_trainer(self) -> CsrTrainer:
        """What products without inactive weights are built on. Raises UsageError where there can be none."""

    def layer_facts(self) -> tuple[LayerInfo, ...]:
        """Every weight that could be masked, with its active count."""

    def state_dict(self) -> dict[str, Any]:
        """Numbers, and mappings name -> tensor."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""


class CsrTrainer(Protocol):
    """What `sparse_export.train.step_csr.StepCsr` needs of a trainer, as `SparseTraining` has it.

    Attributes:
        optimizer: of the training.
        optimizers: all of them, where there are several.
        masks: bool, by parameter name.
        n_steps, n_updates: so far.
        update_every: steps between mask updates; None where they are made from outside.
        rule: what the method decides.
        has_pattern: are the masks under an N:M pattern?
        density_falls: does the density fall from above to the target?
    """

    model: nn.Module
    masks: dict[str, Tensor]
    n_updates: int
    update_every: int | None

    @property
    def n_steps(self) -> int: ...
    @property
    def optimizer(self) -> Optimizer: ...
    @property
    def optimizers(self) -> tuple[Optimizer, ...]: ...
    @property
    def rule(self) -> Method: ...
    @property
    def has_pattern(self) -> bool: ...
    @property
    def density_falls(self) -> bool: ...

    def next_update(self, every: int | None = None) -> int | None:
        """How many steps will be done when masks are next updated; None for never."""

    def before_update(self, do: Callable[[], None]) -> Callable[[], None]:
        """Have something done before every update. Returns what ends that."""

    def rest(self, names: Collection[str]) -> None:
        """Leave these weights, and no others, out of what sets inactive weights to zero."""
