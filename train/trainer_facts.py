"""What the trainer for anybody's loop says of itself."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_export.formats.run import CostInfo, LayerInfo, Run
from sparse_export.formats.score import Score
from sparse_export.sparsity import Distribution, PruneSchedule
from sparse_export.train.arguments import require_names
from sparse_export.train.density_fall import DensityFall
from sparse_export.train.exploration import Exploration
from sparse_export.train.gradient_sums import GradientSums
from sparse_export.train.layer_checks import EmptyLayers, warn_of_unfinished, warn_of_unmasked
from sparse_export.train.layers import computed_weights, layer_facts
from sparse_export.train.mask_pass import MaskPass
from sparse_export.train.mask_state import MaskState, gradients_of
from sparse_export.train.masked_layers import MaskedLayers
from sparse_export.train.methods import Method
from sparse_export.train.methods.method import Moment
from sparse_export.train.narrowing import Narrowing
from sparse_export.train.optimizer_state import OptimizerState
from sparse_export.train.optimizer_steps import OptimizerSteps
from sparse_export.train.pruning_memory import PruningMemory
from sparse_export.train.record import n_entries, new_run_info
from sparse_export.train.update_schedule import BackOff, UpdateSchedule
from sparse_export.train.user_run import FreeSizes, GivenShapes, SeenCall, save_user_run

__all__ = ["TrainerFacts"]


class TrainerFacts(ABC):
    """What `SparseTraining` can be asked, which changes nothing."""

    model: nn.Module
    masks: dict[str, Tensor]
    n_masked: int
    _layers: MaskedLayers
    _pass: MaskPass
    _schedule: UpdateSchedule
    _steps: OptimizerSteps
    _state: OptimizerState
    _rule: Method
    _back_off: BackOff
    _n_flipped: Tensor | None
    _n_now_active: int
    _n_cap: int
    _empty: EmptyLayers
    _fall: DensityFall | None
    _memory: PruningMemory
    _narrowing: Narrowing
    _gradient_sums: GradientSums | None
    _exploration: Exploration
    _threshold: Tensor | None
    _start: Distribution
    _seen: SeenCall
    seed: int
    density: float
    n_updates: int
    update_every: int | None
    last_prune_rate: float | None

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
        group, first = self.optimizer.param_groups[0], self.optimizer.defaults.get("lr")
        share = 1.0
        if self._schedule.prune_schedule == "learning-rate" and first is not None and float(first) > 0:
            share = min(1.0, float(group["lr"]) / float(first))
        return self._schedule.prune_rate(self.n_steps, share) * self._back_off.factor

    @property
    def flip_rate(self) -> float | None:
        """Mask bits changed by the last update / masked weights; None before one. Reads from the device."""
        return None if self._n_flipped is None else int(self._n_flipped) / self.n_masked

    @property
    def density_now(self) -> float:
        """Active / masked weights as they stand; other than `density` only while a cap is approached, or the
        density falls.
        """
        return self._n_now_active / self.n_masked

    @property
    def density_falls(self) -> bool:
        """Does the density fall from above to the target?"""
        return self._fall is not None

    @property
    def explored(self) -> float | None:
        """Weights that were ever active / masked weights, the in-time over-parameterization rate.

        None where a resumed state does not know it. Reads from the device.
        """
        return self._exploration.share()

    @property
    def mean_densities(self) -> dict[str, float] | None:
        """The density of each layer, the mean over the steps so far; None where a resumed state does not know
        it. Reads from the device.
        """
        return self._exploration.mean_densities(self.n_steps)

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

    def next_update(self, every: int | None = None) -> int | None:
        """How many steps will be done when masks are next updated; None for never.

        Updates that a pattern's approach or gradual pruning adds are not known here.

        Args:
            every: steps between updates that are made from outside, where `update_every` is None.
        """
        every = self.update_every or every
        return None if every is None else self._schedule.next_update(self.n_steps, every)

    def state_dict(self) -> dict[str, Any]:
        """Masks and position in the schedule; weights and optimizer state are saved by their owners.

        Where growth goes by the gradient, that of the last step too: an update may come next. Warns where
        weights are not 0 that should be, as those that another optimizer steps.
        """
        self._empty.look()
        if self._pass.rests_none:
            warn_of_unmasked(self._layers.parameters, self.masks)
        growth = self._rule.growth
        reads_gradient = growth is not None and growth.reads_gradient
        return MaskState(
            masks=self.masks,
            n_steps=self.n_steps,
            n_updates=self.n_updates,
            back_off=self._back_off,
            last_prune_rate=self.last_prune_rate,
            n_flipped=None if self._n_flipped is None else int(self._n_flipped),
            threshold=None if self._threshold is None else float(self._threshold),
            gradients=gradients_of(self._layers.parameters) if reads_gradient else None,
            gradient_sums=None if self._gradient_sums is None else self._gradient_sums.sums,
        ).table() | {**self._memory.table(), **self._exploration.table(self.n_steps)}

    def run(
        self,
        path: str | Path,
        *,
        model: str | None = None,
        input_shape: Sequence[int] | None = None,
        example_inputs: Callable[[], Any] | None = None,
        free_sizes: FreeSizes | None = None,
        test: Score | None = None,
        validation: Score | None = None,
        task: str | None = None,
        data: str | None = None,
    ) -> Run:
        """Write the network as it stands as a finished run folder, ready for `sparse_export.build`.

        Args:
            path: of a new or empty folder.
            model: a known name or `package.module:factory` that makes it again; else only this run is built.
            input_shape: of one sample, of a network with one input of floats.
            example_inputs: a function that returns a tensor, a tuple of positional arguments, a mapping of
                keyword arguments, or both. Default: that beside the factory, else the first batch seen.
            free_sizes: names for the axes of inputs; by default the first of all is the batch, and free.
            test: score that goes on record; by default that on data, where these are given.
            validation: likewise, of samples that choices were made by.
            task, data: what it is for and scored on, as `sparsify` takes them.

        Warns where masks are not yet those of the end. A weight that the network does not use in evaluation,
        as that of an auxiliary head, is recorded as dense.

        Raises SparseExportError: the shape is not known, `model` makes another network, the folder cannot be
            written, or holds something.
        """
        require_names(model=model, task=task, data=data)
        warn_of_unfinished(
            self.n_steps,
            self.total_steps,
            density=self.density_now,
            wanted=self._layers.n_active(self._layers.n_last) / self.n_masked,
            cap=None if self._layers.is_down(self._n_cap) or self._layers.plan is None else self._n_cap,
        )
        record = partial(
            new_run_info,
            n_parameters=n_entries(self.model),
            method=self.method,
            seed=self.seed,
            n_threads=torch.get_num_threads(),
            device=str(next(iter(self.masks.values())).device),
            target_density=self.density,
            n_steps=self.n_steps,
            validation=validation,
            cost=CostInfo(
                mean_density=self._mean_density(), explored=self.explored, macs=None, dense_macs=None
            ),
        )
        shapes = GivenShapes(input_shape, example_inputs, free_sizes, test, task, data)
        return save_user_run(
            Path(path), self.model, self.masks, self._seen, self.layer_facts(), record, shapes, name=model
        )

    def _moment(self, rate: float, *, is_cut: bool) -> Moment:
        """Where the training stands. is_cut: has the pattern's cap just become smaller?"""
        layers, n = self._layers, self._n_cap
        n_wanted, magnitudes = self._n_wanted(n), self._memory.magnitudes()
        return Moment(
            parameters=layers.parameters,
            masks=self.masks,
            momentum=self._state.momentum,
            prune_rate=rate,
            n_wanted=n_wanted,
            n_before=self._n_now_active,
            magnitudes=magnitudes,
            gradient_sums={} if self._gradient_sums is None else self._gradient_sums.sums,
            caps=layers.caps(n),
            transposable=layers.transposable if layers.is_down(n) else (),
            is_cut=is_cut,
            threshold=self._threshold,
            seed=self.seed,
            step=self.n_steps,
            start=self._start,
            places=self._narrowing.places(magnitudes, self.masks, n_wanted / self.n_masked),
        )

    def _mean_density(self) -> float | None:
        densities = self.mean_densities
        if densities is None:
            return None
        return sum(densities[name] * mask.numel() for name, mask in self.masks.items()) / self.n_masked

    def _n_wanted(self, n: int) -> int:
        """Active weights that an update now is to leave. n: the pattern's cap."""
        n_last = self._layers.n_active(n)
        if self._fall is None:
            return n_last
        return self._fall.n_active(self.n_masked, self._n_now_active, step=self.n_steps, n_last=n_last)
