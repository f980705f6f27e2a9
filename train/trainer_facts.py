"""What the trainer for anybody's loop says of itself."""

from __future__ import annotations

from abc import ABC

from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_export.formats.run import LayerInfo
from sparse_export.sparsity import PruneSchedule
from sparse_export.train.layer_checks import EmptyLayers
from sparse_export.train.layers import computed_weights, layer_facts
from sparse_export.train.masked_layers import MaskedLayers
from sparse_export.train.methods import Method
from sparse_export.train.optimizer_steps import OptimizerSteps
from sparse_export.train.update_schedule import BackOff, UpdateSchedule

__all__ = ["TrainerFacts"]


class TrainerFacts(ABC):
    """What `SparseTraining` can be asked, which changes nothing."""

    model: nn.Module
    masks: dict[str, Tensor]
    n_masked: int
    _layers: MaskedLayers
    _schedule: UpdateSchedule
    _steps: OptimizerSteps
    _rule: Method
    _back_off: BackOff
    _n_flipped: Tensor | None
    _n_now_active: int
    _n_cap: int
    _empty: EmptyLayers

    @property
    def n_steps(self) -> int:
        """Steps made so far. Reads from the device where a fused optimizer may have skipped one."""
        return self._steps.count.settled()

    @property
    def is_attached(self) -> bool:
        """Do hooks on the optimizer do what `after_step` does?"""
        return self._steps.is_attached

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer as it was given; of several the last."""
        return self._steps.given[-1]

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """All of them, as torch has them."""
        return self._steps.optimizers

    @property
    def rule(self) -> Method:
        """What the method decides, with the answers that are replaced."""
        return self._rule

    @property
    def method(self) -> str:
        """The name of the method."""
        return self._rule.name

    @property
    def moves_at_updates(self) -> bool:
        """Do masks move at updates only, which `update` can ask for?"""
        return self._rule.moves

    @property
    def has_pattern(self) -> bool:
        """Are the masks under an N:M pattern?"""
        return self._layers.plan is not None

    @property
    def total_steps(self) -> int | None:
        return self._schedule.total_steps

    @property
    def prune_schedule(self) -> PruneSchedule:
        return self._schedule.prune_schedule

    @property
    def is_frozen(self) -> bool:
        """Do the masks stand still from now on?"""
        return self._schedule.is_frozen(self.n_steps)

    @property
    def prune_rate(self) -> float:
        """The prune rate that an update would use now."""
        return self._schedule.prune_rate(self.n_steps) * self._back_off.factor

    @property
    def flip_rate(self) -> float | None:
        """Mask bits changed by the last update / masked weights; None before one. Reads from the device."""
        return None if self._n_flipped is None else int(self._n_flipped) / self.n_masked

    @property
    def density_now(self) -> float:
        """Active / masked weights as they stand; other than `density` only while a cap is approached."""
        return self._n_now_active / self.n_masked

    @property
    def empty_layers(self) -> tuple[str, ...]:
        """Weights without an active one, each of which was warned of. Reads from the device."""
        self._empty.look()
        return tuple(self._empty.names)

    def layer_facts(self) -> tuple[LayerInfo, ...]:
        """Every weight that could be masked, with its active count. Reads from the device."""
        plan = self._layers.plan
        if plan is None:
            return layer_facts(self.model, self.masks)
        promised = dict.fromkeys(self.masks, str(plan.pattern)) if self._layers.is_down(self._n_cap) else {}
        return layer_facts(self.model, self.masks, promised, plan.why_dense)

    @property
    def why_dense(self) -> dict[str, str]:
        """The reason for each weight that a pattern was not put on, and for each that is computed."""
        plan = self._layers.plan
        computed = {name: reason for name, (_, reason) in computed_weights(self.model).items()}
        return (plan.why_dense if plan is not None else {}) | computed
