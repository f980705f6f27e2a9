"""Sparse training around anybody's loop: masks over a network's weights, moved by a method."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_export.errors import UsageError
from sparse_export.formats.run import Accuracy, LayerInfo, Run
from sparse_export.sparsity import (
    Distribution,
    MaskUpdate,
    NMPattern,
    Prune,
    PruneSchedule,
    Redistribution,
)
from sparse_export.sparsity.eligible import SMALL_SHARE
from sparse_export.train.distributed import masks_sha256, require_same_masks, train_together
from sparse_export.train.first_masks import checked_masks, first_masks, require_start, rescale_weights
from sparse_export.train.layers import layer_facts, unwrapped
from sparse_export.train.mask_pass import MaskPass
from sparse_export.train.mask_state import MaskState
from sparse_export.train.masked_layers import masked_layers
from sparse_export.train.methods import Method
from sparse_export.train.methods.method import GrowthName, Moment
from sparse_export.train.optimizer_state import forget_momentum, require_optimizer
from sparse_export.train.own_loop import own_loop_config
from sparse_export.train.record import n_entries, new_run_info
from sparse_export.train.sparsity_config import DEFAULT_APPROACH, SparsityConfig
from sparse_export.train.update_schedule import BackOff, update_schedule
from sparse_export.train.user_run import FreeSizes, GivenShapes, SeenCall, save_user_run

__all__ = ["SparseTraining"]


class SparseTraining:
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
        optimizer: SGD with momentum, Adam or AdamW over the model's parameters.
        density: needed without a pattern and without masks; held exactly from the start to the end.
        pattern: `2:4` for example, or an `NMPattern`.
        total_steps: length of the training, which the prune rate falls over; without it the rate stays
            constant.
        update_every: masks are updated after so many steps, never within the last such stretch before
            total_steps; None: only when `update` is called.
        prune_schedule: None for `cosine` where total_steps is given, else `constant`.
        method: one of `sparse_export.train.methods.OWN_LOOP_METHODS`. `snip` needs the `masks` of
            `sparse_export.train.methods.snip.snip_masks`.
        seed: of the first masks, and of growth where it is random.
        process_group: the processes that hold the same weights, as data parallelism has them; by default all,
            where torch.distributed is initialised. Their masks are held against each other after every
            update.
        freeze: None for what the method has, under a pattern too.
        output_layers: weights that give the outputs, which a pattern leaves dense; None for the layer
            registered last.
        masks: to start with, by parameter name, in place of random ones; they then decide the density.
        unfit: weights that a pattern leaves dense, each with the reason.

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
        optimizer: Optimizer,
        *,
        density: float | None = None,
        pattern: NMPattern | str | None = None,
        total_steps: int | None = None,
        update_every: int | None = 500,
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
        masks: Mapping[str, Tensor] | None = None,
        transposable: bool = False,
        unfit: Mapping[str, str] | None = None,
    ) -> None:
        config = own_loop_config(
            total_steps=total_steps,
            has_masks=masks is not None,
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
            keep_dense=keep_dense,
        )
        self._set_up(model, optimizer, config, total_steps, seed, output_layers, masks, process_group, unfit)

    @classmethod
    def from_config(
        cls,
        model: nn.Module,
        optimizer: Optimizer,
        config: SparsityConfig,
        *,
        total_steps: int | None,
        seed: int = 0,
        output_layers: Sequence[str] | None = None,
        masks: Mapping[str, Tensor] | None = None,
        process_group: Any = None,
        unfit: Mapping[str, str] | None = None,
    ) -> Self:
        """A trainer by a configuration, with the defaults that it has for a recipe.

        Args:
            model, optimizer, total_steps, seed, output_layers, process_group, unfit: see the class.
            config: its density is not read where there are masks.
            masks: to start with, by parameter name.

        Raises:
            UsageError, RanksDiverged: as the class does.
        """
        trainer = cls.__new__(cls)
        trainer._set_up(
            model, optimizer, config, total_steps, seed, output_layers, masks, process_group, unfit
        )
        return trainer

    def _set_up(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: SparsityConfig,
        total_steps: int | None,
        seed: int,
        output_layers: Sequence[str] | None,
        masks: Mapping[str, Tensor] | None,
        process_group: Any,
        unfit: Mapping[str, str] | None,
    ) -> None:
        model = unwrapped(model)
        if masks is not None:
            masks = {name: mask.bool() for name, mask in masks.items()}  # of whatever type they were given
        rule = config.rule
        self._schedule = update_schedule(config, total_steps)
        require_start(rule, self._schedule, masks)
        self._layers = masked_layers(
            model,
            config,
            masks=masks,
            output_layers=output_layers,
            total_steps=total_steps,
            unfit=unfit,
        )
        require_optimizer(optimizer, self._layers.parameters, momentum=rule.reads_momentum)
        self.model, self.optimizer = model, optimizer
        self._rule, self._start, self.seed = rule, config.start, seed
        self.update_every = config.update_every or None
        self.n_steps = self.n_updates = 0
        self.last_prune_rate: float | None = None
        self._back_off = BackOff()
        self._threshold: Tensor | None = None
        self._n_flipped: Tensor | None = None
        self._before_update: list[Callable[[], None]] = []
        self._process_group = process_group
        self.masks_sha256: str | None = None
        self.n_masked = self._layers.n_weights
        self.n_active = self._layers.n_active(self._layers.n_last)
        wanted = None if masks is not None else config.wanted_density
        self.density = self.n_active / self.n_masked if wanted is None else wanted
        self._n_cap = self._layers.n_at(0)
        first = (
            first_masks(self._layers, config, seed) if masks is None else checked_masks(self._layers, masks)
        )
        self._n_now_active = sum(int(mask.sum()) for mask in first.values())
        self._pass = MaskPass(self._layers.parameters, first)
        self.masks = self._pass.masks
        if config.rescale and masks is None:
            rescale_weights(self._layers, self.masks)
        self.apply_masks()
        self._require_same_masks()
        self._seen = SeenCall(model)

    def apply_masks(self) -> None:
        """Set the inactive weights to zero: the one part of a step that touches the device."""
        self._pass.apply()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step the optimizer, set inactive weights to zero again, and update the masks when it is time."""
        loss: float | None = self.optimizer.step(closure) if closure else self.optimizer.step()
        self.after_step()
        return loss

    def after_step(self) -> None:
        """What `step` does after the optimizer's own, for loops in which something else steps it."""
        self.apply_masks()
        self.advance()

    def advance(self) -> None:
        """Count a step whose masks were applied, and update the masks when it is time."""
        self.n_steps += 1
        if (
            self._layers.n_at(self.n_steps) != self._n_cap
            or self._is_last_cut()
            or (self.update_every is not None and self._schedule.is_due(self.n_steps, self.update_every))
        ):
            self.update()

    def next_update(self, every: int | None = None) -> int | None:
        """How many steps will be done when masks are next updated; None for never.

        Updates that a pattern's approach or gradual pruning adds are not known here.

        Args:
            every: steps between updates that are made from outside, where `update_every` is None.
        """
        every = self.update_every or every
        return None if every is None else self._schedule.next_update(self.n_steps, every)

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

    def csr_trainer(self) -> Self:
        """What `StepCsr` is built on."""
        return self

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

    def update(self) -> MaskUpdate:
        """Prune and grow now. A newly active weight starts at 0, a pruned and regrown one keeps its value.

        Returns:
            What was pruned and grown.

        Raises:
            UsageError: the masks of this method never move.
            RanksDiverged: several processes train together and no longer have one mask.
        """
        decide = self._rule.update
        if decide is None:
            raise UsageError(
                f"The method is {self.method!r}, whose masks never move, so they cannot be updated.",
                do="Leave it out, or choose another method.",
            )
        for do in self._before_update:
            do()
        before, self._n_cap = self._n_cap, self._layers.n_at(self.n_steps)
        rate = self.last_prune_rate = self.prune_rate
        now = self._moment(rate, is_cut=self._n_cap != before)
        update = decide(self._rule, now)
        self._n_now_active, self._threshold = self._rule.n_active(now), update.threshold
        flips = [torch.count_nonzero(mask ^ self.masks[name]) for name, mask in update.masks.items()]
        self._n_flipped = torch.stack(flips).sum()
        if self._rule.forgets:
            born = {name: mask & ~self.masks[name] for name, mask in update.masks.items()}
            forget_momentum(self.optimizer, self._layers.parameters, born)
        self._pass.set(update.masks)
        self.apply_masks()
        self.n_updates += 1
        if self.has_pattern:
            self._back_off = self._back_off.after(int(self._n_flipped), same_cap=self._n_cap == before)
        self._require_same_masks()
        return update

    def _is_last_cut(self) -> bool:
        """Is this the step at which gradual pruning has to arrive?"""
        return self._rule.is_gradual and self.n_steps == self._schedule.end

    def _moment(self, rate: float, *, is_cut: bool) -> Moment:
        """Where the training stands. is_cut: has the pattern's cap just become smaller?"""
        layers, n = self._layers, self._n_cap
        return Moment(
            parameters=layers.parameters,
            masks=self.masks,
            optimizer=self.optimizer,
            prune_rate=rate,
            n_wanted=layers.n_active(n),
            n_before=self._n_now_active,
            caps=layers.caps(n),
            transposable=layers.transposable if layers.is_down(n) else (),
            is_cut=is_cut,
            threshold=self._threshold,
            seed=self.seed,
            step=self.n_steps,
            end=self._schedule.end,
            start=self._start,
        )

    def _require_same_masks(self) -> None:
        """Where several processes train together: compare the masks. Raises RanksDiverged in each of them."""
        if train_together(self._process_group):
            self.masks_sha256 = masks_sha256(self.masks)
            require_same_masks(self.masks_sha256, self._process_group)

    def layer_facts(self) -> tuple[LayerInfo, ...]:
        """Every weight that could be masked, with its active count. Reads from the device."""
        plan = self._layers.plan
        if plan is None:
            return layer_facts(self.model, self.masks)
        promised = dict.fromkeys(self.masks, str(plan.pattern)) if self._layers.is_down(self._n_cap) else {}
        return layer_facts(self.model, self.masks, promised, plan.why_dense)

    @property
    def why_dense(self) -> dict[str, str]:
        """Under a pattern, the reason for each weight that it was not put on."""
        return dict(self._layers.plan.why_dense) if self._layers.plan is not None else {}

    def state_dict(self) -> dict[str, Any]:
        """Masks and position in the schedule; weights and optimizer state are saved by their owners.

        Where growth goes by the gradient, that of the last step too: an update may come next.
        """
        gradients = None
        growth = self._rule.growth
        if growth is not None and growth.reads_gradient:
            found = {name: value.grad for name, value in self._layers.parameters.items()}
            gradients = {name: value for name, value in found.items() if value is not None}
        return MaskState(
            masks=self.masks,
            n_steps=self.n_steps,
            n_updates=self.n_updates,
            back_off=self._back_off,
            last_prune_rate=self.last_prune_rate,
            n_flipped=None if self._n_flipped is None else int(self._n_flipped),
            threshold=None if self._threshold is None else float(self._threshold),
            gradients=gradients,
        ).table()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state. Raises UsageError when it belongs to other layers."""
        saved = MaskState.from_table(state, self.masks)
        self._pass.set(saved.masks)
        self.n_steps, self.n_updates = saved.n_steps, saved.n_updates
        self.last_prune_rate, self._back_off = saved.last_prune_rate, saved.back_off
        self._n_flipped = None if saved.n_flipped is None else torch.tensor(saved.n_flipped)
        self._n_cap = self._layers.n_at(self.n_steps)
        self._n_now_active = sum(int(mask.sum()) for mask in saved.masks.values())
        mask, self._threshold = next(iter(self.masks.values())), None
        if saved.threshold is not None:
            self._threshold = mask.new_tensor(saved.threshold, dtype=torch.float64)
        for name, gradient in (saved.gradients or {}).items():
            value = self._layers.parameters[name]
            value.grad = torch.empty_like(value, requires_grad=False).copy_(gradient)
        self.apply_masks()
        self._require_same_masks()

    def run(
        self,
        path: str | Path,
        *,
        model: str | None = None,
        input_shape: Sequence[int] | None = None,
        free_sizes: FreeSizes | None = None,
        test: Accuracy | None = None,
    ) -> Run:
        """Write the network as it stands as a finished run folder, ready for `sparse_export.build`.

        Args:
            path: of a new or empty folder.
            model: a known name or `package.module:factory` that makes it again; else only this run is built.
            input_shape: of one sample; by default the inputs are those of the first batch that was seen.
            free_sizes: names for the axes of inputs; by default the first of all is the batch, and free.
            test: accuracy on the test set, which goes on record.

        Raises:
            UsageError: the shape is not known, or the folder holds something already.
            OutputError: it cannot be written.
        """
        record = partial(
            new_run_info,
            n_parameters=n_entries(self.model),
            method=self.method,
            data=None,
            layers=self.layer_facts(),
            seed=self.seed,
            n_threads=torch.get_num_threads(),
            device=str(next(iter(self.masks.values())).device),
            target_density=self.density,
            test=test,
            n_steps=self.n_steps,
        )
        shapes = GivenShapes(input_shape=input_shape, free_sizes=free_sizes)
        return save_user_run(Path(path), self.model, self.masks, self._seen, record, shapes, name=model)
