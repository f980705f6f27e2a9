"""Sparse training around anybody's loop: masks over a network's weights, moved by a method."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_export.errors import UsageError
from sparse_export.sparsity import (
    Distribution,
    MaskUpdate,
    NMPattern,
    Prune,
    PruneSchedule,
    Redistribution,
)
from sparse_export.sparsity.eligible import SMALL_SHARE
from sparse_export.train.density_fall import density_fall
from sparse_export.train.distributed import masks_sha256, require_same_masks, train_together
from sparse_export.train.divergence import update_diverged
from sparse_export.train.exploration import Exploration
from sparse_export.train.first_masks import checked_masks, first_masks, require_start, rescale_weights
from sparse_export.train.gradient_sums import GradientSums
from sparse_export.train.layer_checks import (
    EmptyLayers,
    require_trained,
    warn_of_left_dense,
    warn_of_lost,
    warn_of_trained,
    warn_of_unused,
)
from sparse_export.train.layers import computed_weights, unwrapped
from sparse_export.train.mask_pass import MaskPass, weights_of_copy, zero_inactive
from sparse_export.train.mask_state import MaskState, put_gradients
from sparse_export.train.masked_layers import masked_layers
from sparse_export.train.methods import METHODS_WITHOUT_MOMENTUM
from sparse_export.train.methods.method import GrowthName
from sparse_export.train.narrowing import Narrowing
from sparse_export.train.optimizer_state import MomentumOf, OptimizerState
from sparse_export.train.optimizer_steps import Attachment, OptimizerSteps, StepCount
from sparse_export.train.own_loop import FirstMasks, Given, own_loop_config, require_length, require_types
from sparse_export.train.pruning_memory import PruningMemory
from sparse_export.train.sparsity_config import DEFAULT_APPROACH, SparsityConfig
from sparse_export.train.trainer_facts import TrainerFacts
from sparse_export.train.update_schedule import BackOff, update_schedule, with_own_interval
from sparse_export.train.user_run import SeenCall

__all__ = ["SparseTraining"]


class SparseTraining(TrainerFacts):
    """Keeps a network sparse while a user's own loop trains it.

        trainer = SparseTraining(model, optimizer, density=0.05, total_steps=10_000)
        ...
        loss.backward()
        trainer.step()                       # in place of optimizer.step()

    The keywords are the settings of `sparse_export.train.sparsity_config.SparsityConfig`, which documents
    each of them, but where `Args` below says something else. Weights of the model are changed in place. Masks
    live on the weights' device as bool tensors, see `MaskPass`; in a pattern's training `why_dense` has the
    reason for each weight that is not masked.

    Where the loop replays a CUDA graph, capture `optimizer.step()` and `apply_masks()` in it, and call
    `advance()` after each replay: masks are overwritten in place, so the graph goes on to read them.

    Args:
        model: on the device that it is trained on; one wrapped by DistributedDataParallel or torch.compile
            counts as the network inside.
        optimizer: over the model's parameters, or a sequence of several that share them, in the order in
            which they step. By default their momentum decides: SGD with momentum, Adam, AdamW, NAdam, RAdam,
            Lion, LAMB, Muon, or an Adafactor that keeps a first moment.
        density: needed without a pattern and without masks; held exactly from the start to the end.
        pattern: `2:4` for example, or an `NMPattern`.
        total_steps: length of the training, over which the prune rate falls; without it the rate stays.
        update_every: masks are updated after so many steps, never within the last such stretch before
            total_steps; None: only when `update` is called; `"auto"`: 500, or a twentieth of total_steps
            where that is less.
        prune_schedule: None for `cosine` where total_steps is given, else `constant`.
        method: one of `sparse_export.train.methods.OWN_LOOP_METHODS`. `snip` needs the `masks` of
            `sparse_export.train.methods.snip.snip_masks`.
        seed: of the first masks, and of growth where it is random.
        process_group: the processes that hold the same weights, as data parallelism has them; by default all,
            where torch.distributed is initialised. After every update their masks are compared.
        freeze: None for what the method has, under a pattern too.
        output_layers: weights that give the outputs, which a pattern leaves dense; None for the layer
            registered last.
        masks: to start with, by parameter name, in place of random ones; they then decide the density. For a
            network that is trained already, dense or sparse, `"magnitude"` keeps its largest weights at the
            density or the pattern asked for, and does not rescale them. All weights that are not 0 stay
            where they have room, however they are spread over the layers; of zeros, active ones are drawn.
        unfit: weights that a pattern leaves dense, each with the reason.
        momentum_of: reads the momentum of a parameter from any other optimizer; called with both, it gives a
            tensor of the parameter's shape, or None before there is one.

    Raises:
        UsageError: a setting is out of its range, settings contradict each other, or the network or the
            optimizer cannot be trained so.
        RanksDiverged: the processes that train together start with different masks.

    Source: Dettmers & Zettlemoyer 2019, "Sparse networks from scratch"; of the other methods see their
    modules.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        density: float | None = None,
        pattern: NMPattern | str | None = None,
        total_steps: int | None = None,
        update_every: int | Literal["auto"] | None = "auto",
        start_density: float | None = None,
        falls_until: float | None = None,
        history: float = 0.0,
        narrowing: float = 0.0,
        prune_rate: float = 0.5,
        final_prune_rate: float | None = None,
        prune_schedule: PruneSchedule | None = None,
        method: str = "sparse-momentum",
        redistribution: Redistribution | None = None,
        growth: GrowthName | None = None,
        prune: Prune | None = None,
        start: Distribution = "erdos-renyi",
        rescale: bool = True,
        keep_dense: Sequence[str] = (),
        seed: int = 0,
        process_group: Any = None,
        approach: tuple[float, float] = DEFAULT_APPROACH,
        freeze: float | None = None,
        output_layers: Sequence[str] | None = None,
        small_share: float = SMALL_SHARE,
        masks: FirstMasks | None = None,
        transposable: bool = False,
        unfit: Mapping[str, str] | None = None,
        momentum_of: MomentumOf | None = None,
    ) -> None:
        config = own_loop_config(
            total_steps=total_steps,
            has_masks=not (masks is None or isinstance(masks, str)),
            method=method,
            density=density,
            pattern=pattern,
            approach=approach,
            freeze=freeze,
            small_share=small_share,
            transposable=transposable,
            start=start,
            rescale=rescale,
            prune_rate=prune_rate,
            final_prune_rate=final_prune_rate,
            prune_schedule=prune_schedule,
            prune=prune,
            redistribution=redistribution,
            growth=growth,
            update_every=update_every,
            start_density=start_density,
            falls_until=falls_until,
            history=history,
            narrowing=narrowing,
            keep_dense=keep_dense,
        )
        given = Given(total_steps, seed, output_layers, masks, process_group, unfit, momentum_of)
        self._set_up(model, optimizer, config, given)

    @classmethod
    def from_config(
        cls,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        config: SparsityConfig,
        *,
        total_steps: int | None,
        seed: int = 0,
        output_layers: Sequence[str] | None = None,
        masks: FirstMasks | None = None,
        process_group: Any = None,
        unfit: Mapping[str, str] | None = None,
        momentum_of: MomentumOf | None = None,
    ) -> Self:
        """A trainer by a configuration, with the defaults that it has for a recipe.

        Args:
            model, optimizer, total_steps, seed, output_layers, process_group, unfit, momentum_of: see the
                class.
            config: its density is not read where there are masks.
            masks: to start with, see the class.

        Raises:
            UsageError, RanksDiverged: as the class does.
        """
        trainer = cls.__new__(cls)
        require_length(config.freeze, total_steps)
        config = with_own_interval(config, total_steps)
        given = Given(total_steps, seed, output_layers, masks, process_group, unfit, momentum_of)
        trainer._set_up(model, optimizer, config, given)
        return trainer

    def _set_up(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        config: SparsityConfig,
        given: Given,
    ) -> None:
        model = unwrapped(model)
        require_types(model, given)
        total_steps, by_magnitude = given.total_steps, isinstance(given.masks, str)
        masks = None if isinstance(given.masks, str) else given.masks
        if masks is not None:
            masks = {name: mask.bool() for name, mask in masks.items()}  # of whatever type they were given
        rule = config.rule
        self._schedule, self._fall = update_schedule(config, total_steps), density_fall(config, total_steps)
        require_start(rule, self._schedule, self._fall, masks)
        self._layers = masked_layers(
            model,
            config,
            masks=masks,
            output_layers=given.output_layers,
            total_steps=total_steps,
            unfit=given.unfit,
        )
        require_trained(self._layers.parameters)
        self._steps = OptimizerSteps(optimizer)
        self._state = OptimizerState(self._steps.optimizers, self._layers.parameters, given.momentum_of)
        if rule.reads_momentum:
            self._state.require_momentum(METHODS_WITHOUT_MOMENTUM)
        self.model = model
        self._rule, self._start, self.seed = rule, config.start, given.seed
        self.update_every = config.update_every or None
        self.n_updates = 0
        self.last_prune_rate: float | None = None
        self._back_off = BackOff()
        self._threshold: Tensor | None = None
        self._n_flipped: Tensor | None = None
        self._before_update: list[Callable[[], None]] = []
        self._is_use_checked = self._is_start_checked = False
        self._memory = PruningMemory(config.history, self._layers.parameters)
        self._gradient_sums = GradientSums(self._layers.parameters) if rule.reads_gradient_sums else None
        self._empty = EmptyLayers()
        self._copies: list[dict[str, Tensor]] = []
        self._process_group = given.process_group
        self.masks_sha256: str | None = None
        self.n_masked = self._layers.n_weights
        self.n_active = self._layers.n_active(self._layers.n_last)
        wanted = None if masks is not None else config.wanted_density
        self.density = self.n_active / self.n_masked if wanted is None else wanted
        self._n_cap = self._layers.n_at(0)
        if self.density < 1:
            warn_of_left_dense(model, self.n_masked, computed_weights(model, config.keep_dense))
        first = (
            first_masks(self._layers, config, given.seed, by_magnitude=by_magnitude)
            if masks is None
            else checked_masks(self._layers, masks)
        )
        self._n_now_active = sum(int(mask.sum()) for mask in first.values())
        self._pass = MaskPass(self._layers.parameters, first)
        self.masks = self._pass.masks
        self._exploration = Exploration(self.masks)
        if masks is None and not by_magnitude and self._n_now_active < self.n_masked:
            warn_of_trained(model, self._layers.parameters, self._steps.optimizers)
        if config.rescale and masks is None and not by_magnitude:
            rescale_weights(self._layers, self.masks)
        self.apply_masks()
        self._require_same_masks()
        self._empty.note(self.masks)
        self._seen = SeenCall(model)
        self._narrowing = Narrowing(config.narrowing, model, self._seen, self.masks)

    def apply_masks(self) -> None:
        """Set the inactive weights to zero: the one part of a step that touches the device."""
        self._pass.apply()

    def attach(self) -> Attachment:
        """Hook the optimizer's step, so that any loop that calls it stays sparse as it is.

            with trainer.attach():           # or trainer.attach() ... trainer.detach()
                train_as_ever(model, optimizer)

        After each `optimizer.step()` inactive weights are set to zero, and masks are updated when it is time.
        Steps count that change weights: not those that a GradScaler leaves out, nor those that a fused
        optimizer skips by its `found_inf`. Of several optimizers the steps of the last one count. `step` and
        `after_step` may be called all the same: they then count nothing. A CUDA graph that captures
        `optimizer.step()` has the masks in it; call `advance` after each replay.

        Returns:
            A context manager that detaches at its end; `detach` does so at any time.

        Raises:
            UsageError: the optimizer is attached already.
        """
        return self._steps.attach(self.apply_masks, self._after_hooked_step, self._before_step)

    def detach(self) -> None:
        """Take the hooks of `attach` away; does nothing where there are none."""
        self._steps.detach()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step the optimizer, set inactive weights to zero again, and update the masks when it is time.

        Raises UsageError for a closure with several optimizers.
        """
        if not self._steps.is_ahead:  # else that step, not somebody's loading, made inactive values nonzero
            self._before_step()
        loss = self._steps.step(closure)
        if not self.is_attached:
            self._after_hooked_step(None)
        return loss

    def after_step(self) -> None:
        """What `step` does after the optimizer's own, for loops in which something else steps it.

        Does nothing where the optimizer made no step since, as a GradScaler leaves one out.
        """
        if not self.is_attached and self._steps.took_outside() is not False:
            self._after_hooked_step(None)

    def advance(self) -> None:
        """Count a step whose masks were applied, and update the masks when it is time."""
        self._count(None)

    def _before_step(self) -> None:
        """Before the first step after the masks were made or loaded: warn of weights that it will zero."""
        if self._is_start_checked or torch.compiler.is_compiling():
            return
        self._is_start_checked = True
        if self._pass.rests_none:
            warn_of_lost(self._layers.parameters, self.masks)

    def _after_hooked_step(self, found_inf: Tensor | None) -> None:
        if not self._is_use_checked:
            self._is_use_checked = warn_of_unused(self._layers.parameters, self.optimizers)
            if self._is_use_checked and self._rule.reads_momentum:
                self._state.require_read()
        if not torch.compiler.is_compiling():
            self._seen.settle()
        self.apply_masks()
        self._count(found_inf)

    def _count(self, found_inf: Tensor | None) -> None:
        """Count a step unless found_inf is not 0, and update the masks when it is time."""
        count = self._steps.count
        count.add(found_inf)
        if self._gradient_sums is not None:
            self._gradient_sums.add(found_inf)
        self._narrowing.look()
        most = count.most
        if self._is_update_due(most) and count.settled() == most:
            self.update()

    def _set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Overwrite the masks, and zero what they leave out."""
        self._pass.set(masks)
        self.apply_masks()
        for copy in self._copies:
            zero_inactive(copy, self.masks)

    def _is_update_due(self, step: int) -> bool:
        """After so many steps?"""
        if self._layers.n_at(step) != self._n_cap or (self._fall is not None and step == self._fall.end):
            return True
        return self.update_every is not None and self._schedule.is_due(step, self.update_every)

    def mask_also(self, copy: nn.Module) -> None:
        """Zero a copy of the network, as a moving average is, where masks are off: now and at every update.

        An average that holds the past of a pruned weight is no sparse network.

        Args:
            copy: torch's `AveragedModel`, for example, or another network with the weights' names.

        Raises:
            UsageError: it lacks one of the masked weights.
        """
        self._copies.append(weights_of_copy(copy, self.masks))
        zero_inactive(self._copies[-1], self.masks)

    def before_update(self, do: Callable[[], None]) -> Callable[[], None]:
        """Have something done before every update, while masks, weights and optimizer are still as they were.

        Args:
            do: is called.

        Returns:
            What ends that.
        """
        self._before_update.append(do)
        return lambda: self._before_update.remove(do)

    def rest(self, names: Collection[str]) -> None:
        """Leave these weights, and no others, out of `apply_masks`: nothing changes them. CPU only."""
        self._pass.rest(names)

    def csr_trainer(self) -> Self:
        """What `StepCsr` is built on."""
        return self

    def update(self) -> MaskUpdate:
        """Prune and grow now. A newly active weight starts at 0, a pruned and regrown one keeps its value.

        Returns:
            What was pruned and grown.

        Raises:
            UsageError: the masks of this method never move.
            TrainingDiverged: weights are no longer numbers.
            RanksDiverged: several processes train together and no longer have one mask.
        """
        decide = self._rule.update
        if decide is None:
            raise UsageError(
                f"The method is {self.method!r}, whose masks never move, so they cannot be updated.",
                do="Leave it out, or choose another method.",
            )
        self._empty.look()
        for do in self._before_update:
            do()
        before, self._n_cap = self._n_cap, self._layers.n_at(self.n_steps)
        rate = self.last_prune_rate = self.prune_rate
        now = self._moment(rate, is_cut=self._n_cap != before)
        try:
            update = decide(self._rule, now)
        except ValueError as cause:
            diverged = update_diverged(self.n_steps, self._layers.parameters.values(), cause)
            if diverged is None:
                raise
            raise diverged from cause
        self._n_now_active, self._threshold = now.n_wanted, update.threshold
        self._memory.keep(
            now.magnitudes, {name: mask & self.masks[name] for name, mask in update.masks.items()}
        )
        flips = [torch.count_nonzero(mask ^ self.masks[name]) for name, mask in update.masks.items()]
        self._n_flipped = torch.stack(flips).sum()
        if self._rule.forgets:
            born = {name: mask & ~self.masks[name] for name, mask in update.masks.items()}
            self._state.forget(born)
        self._set_masks(update.masks)
        self._exploration.moved(self.masks, self.n_steps)
        if self._gradient_sums is not None:
            self._gradient_sums.clear()
        self.n_updates += 1
        if self.has_pattern:
            self._back_off = self._back_off.after(int(self._n_flipped), same_cap=self._n_cap == before)
        self._require_same_masks()
        self._empty.note(self.masks)
        return update

    def _require_same_masks(self) -> None:
        """Where several processes train together: compare the masks. Raises RanksDiverged in each of them."""
        if train_together(self._process_group):
            self.masks_sha256 = masks_sha256(self.masks)
            require_same_masks(self.masks_sha256, self._process_group)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state. Raises UsageError when it belongs to other layers."""
        saved = MaskState.from_table(state, self.masks)
        self._steps.count, self.n_updates = StepCount(saved.n_steps), saved.n_updates
        self.last_prune_rate, self._back_off = saved.last_prune_rate, saved.back_off
        self._n_flipped = None if saved.n_flipped is None else torch.tensor(saved.n_flipped)
        self._n_cap = self._layers.n_at(self.n_steps)
        self._n_now_active = sum(int(mask.sum()) for mask in saved.masks.values())
        mask, self._threshold = next(iter(self.masks.values())), None
        if saved.threshold is not None:
            self._threshold = mask.new_tensor(saved.threshold, dtype=torch.float64)
        put_gradients(self._layers.parameters, saved.gradients or {})
        if self._gradient_sums is not None:
            self._gradient_sums.take_over(saved.gradient_sums or self._gradient_sums.sums)
        self._memory.take_over(state)
        self._set_masks(saved.masks)
        self._is_start_checked = False
        self._exploration.take_over(state, self.masks, saved.n_steps)
        self._require_same_masks()
