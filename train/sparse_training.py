"""Sparse momentum, and the methods it is compared with, around anybody's training loop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

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
    pattern_from_text,
)
from sparse_export.sparsity.eligible import SMALL_SHARE
from sparse_export.train.arguments import require_one_of, require_steps
from sparse_export.train.distributed import masks_sha256, require_same_masks, train_together
from sparse_export.train.first_masks import checked_masks, first_masks, require_start, rescale_weights
from sparse_export.train.growth import forget_momentum
from sparse_export.train.layers import layer_facts, unwrapped
from sparse_export.train.mask_pass import MaskPass
from sparse_export.train.mask_state import MaskState
from sparse_export.train.masked_layers import masked_layers
from sparse_export.train.methods import Growth, Method, chosen_method
from sparse_export.train.momentum import require_optimizer
from sparse_export.train.moves import n_active_gradually, pruned_gradually, swapped
from sparse_export.train.pattern_plan import require_approach
from sparse_export.train.update_schedule import Calm, update_schedule
from sparse_export.train.user_run import SeenShapes, save_user_run


class SparseTraining:
    """Keeps a network sparse while a user's own loop trains it.

        trainer = SparseTraining(model, optimizer, density=0.05, total_steps=10_000)
        ...
        loss.backward()
        trainer.step()                       # in place of optimizer.step()

    model: on the device that it is trained on; one wrapped by DistributedDataParallel or torch.compile counts as
    the network inside.  optimizer: SGD with momentum, Adam or AdamW over its parameters.
    density: kept / total over the masked weights, 0 < density <= 1; held exactly from the start to the end. Without
    it a pattern decides: as much as it allows.
    total_steps: length of the training, which the prune rate falls over; without it the rate stays constant.
    update_every: masks are updated after so many steps, never within the last such stretch before total_steps;
    None: only when `update` is called.
    prune_rate: at the start.  prune_schedule: `cosine` (the default when total_steps is given), `linear`,
    `constant`.
    method: `sparse-momentum`, or one to compare with: `set`, `rigl`, `dsr`, `static`, `magnitude`, and `snip`, which
    needs the `masks` of `sparse_export.train.snip.snip_masks`. See `sparse_export.train.methods`.
    redistribution, prune: see `sparse_export.sparsity.update_masks`.  growth: `momentum`, `random` or `gradient`, see
    `sparse_export.train.methods`. Without them the method decides.
    start: how the first masks are spread over the layers, see `sparse_export.sparsity.layer_counts`.
    rescale: multiply a layer's start weights by 1 / sqrt(its density), which keeps the variance of its outputs.
    keep_dense: shell patterns of parameters or layers that stay dense and are not counted.
    seed: of the first masks, and of growth where it is random.
    pattern: `2:4` for example: at most N of every M weights along a layer's reduction axis. Only layers that can take
    it are masked; `why_dense` has the reason for each of the others, the output layer and the smallest ones among
    them. Under it the prune rate is also lowered whenever an update changes no fewer mask bits than the one before.
    transposable: 2:4 along both axes, for layers that are matrices of tiles of 4 x 4, so that the gradient of their
    inputs can be multiplied sparsely too; other layers under the pattern have it along their inputs. Needs the pattern
    2:4, whose density it has.
    approach: fractions of total_steps over which the cap falls from M to N, see `sparse_export.sparsity.cap_size`.
    freeze: fraction of total_steps after which masks stand still; the prune rate has then run through its schedule,
    and `magnitude` has come down to the density. Without it the method decides.
    output_layers: weights that give the outputs, which a pattern leaves dense; by default the layer registered last.
    small_share: see `sparse_export.sparsity.eligible.SMALL_SHARE`.
    final_prune_rate: where the prune schedule ends, at most prune_rate; none for `constant`. Without it `linear`
    ends at 0, and the method decides where `cosine` does.
    masks: to start with, by parameter name, in place of random ones; they then decide the density.
    process_group: the processes that hold the same weights, as data parallelism has them; by default all, where
    torch.distributed is initialised. Their masks are held against each other after every update.

    Where the loop replays a CUDA graph, capture `optimizer.step()` and `apply_masks()` in it, and call `advance()`
    after each replay: masks are overwritten in place, so the graph goes on to read them.

    Masks live on the weights' device as bool tensors, see `MaskPass`. Changes the model's weights in place.
    Source: Dettmers & Zettlemoyer 2019. Raises UsageError for settings that cannot be meant.
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
        growth: Growth | None = None,
        prune: Prune | None = None,
        start: Distribution = "erdos-renyi",
        rescale: bool = True,
        keep_dense: Sequence[str] = (),
        seed: int = 0,
        process_group: Any = None,
        approach: tuple[float, float] = (0.0, 0.0),
        freeze: float | None = None,
        output_layers: Sequence[str] | None = None,
        small_share: float = SMALL_SHARE,
        masks: Mapping[str, Tensor] | None = None,
        transposable: bool = False,
    ) -> None:
        model = unwrapped(model)
        if isinstance(pattern, str):
            pattern = pattern_from_text(pattern)
        if masks is not None:
            masks = {name: mask.bool() for name, mask in masks.items()}  # of whatever type they were given
        rule = chosen_method(method, prune=prune, redistribution=redistribution, growth=growth)
        require_steps("update_every", update_every)
        require_one_of("start", start, get_args(Distribution))
        self._schedule = update_schedule(
            method,
            rule,
            total_steps=total_steps,
            freeze=freeze,
            prune_rate=prune_rate,
            final_prune_rate=final_prune_rate,
            prune_schedule=prune_schedule,
        )
        require_start(method, rule, self._schedule, masks, pattern)
        require_approach(approach, self._schedule.freeze, pattern)
        self._layers = masked_layers(
            model,
            rule,
            density=density,
            pattern=pattern,
            masks=masks,
            keep_dense=keep_dense,
            output_layers=output_layers,
            small_share=small_share,
            approach=approach,
            total_steps=total_steps,
            transposable=transposable,
        )
        require_optimizer(optimizer, self._layers.parameters, momentum=rule.reads_momentum)
        self.model, self.optimizer = model, optimizer
        self.method, self._rule = method, rule
        self._start, self.seed = start, seed
        self.update_every = update_every
        self.n_steps = self.n_updates = 0
        self.last_prune_rate: float | None = None
        self._calm = Calm()
        self._threshold: Tensor | None = None
        self._n_flipped: Tensor | None = None
        self._before_update: list[Callable[[], None]] = []
        self._process_group = process_group
        self.masks_sha256: str | None = None
        self.n_masked = self._layers.n_weights
        self.n_active = self._layers.n_active(self._layers.n_last)
        self.density = self.n_active / self.n_masked if density is None else density
        self._n_cap = self._layers.n_at(0)
        first = (
            first_masks(self._layers, rule, start, seed)
            if masks is None
            else checked_masks(self._layers, masks)
        )
        self._n_now_active = sum(int(mask.sum()) for mask in first.values())
        self._pass = MaskPass(self._layers.parameters, first)
        self.masks = self._pass.masks
        if rescale and masks is None:
            rescale_weights(self._layers, self.masks)
        self.apply_masks()
        self._require_same_masks()
        self._seen = SeenShapes(model)

    def apply_masks(self) -> None:
        """Set the inactive weights to zero: the one part of a step that touches the device."""
        self._pass.apply()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step the optimiser, set inactive weights to zero again, and update the masks when it is time."""
        loss: float | None = self.optimizer.step(closure) if closure else self.optimizer.step()
        self.after_step()
        return loss

    def after_step(self) -> None:
        """What `step` does after the optimiser's own, for loops in which something else steps it."""
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

        every: of updates that are made from outside, where `update_every` is None. Nothing is known here of those that
        a pattern's approach or gradual pruning adds.
        """
        every = self.update_every or every
        return None if every is None else self._schedule.next_update(self.n_steps, every)

    def before_update(self, do: Callable[[], None]) -> Callable[[], None]:
        """Have something done before every update, while masks, weights and optimiser are still as they were.

        Returns what ends that.
        """
        self._before_update.append(do)
        return lambda: self._before_update.remove(do)

    def rest(self, names: Collection[str]) -> None:
        """Leave these weights, and no others, out of `apply_masks`: nothing changes them. CPU only."""
        self._pass.rest(names)

    @property
    def rule(self) -> Method:
        """What the method decides, with the choices that were replaced."""
        return self._rule

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
        return self._schedule.prune_rate(self.n_steps) * self._calm.factor

    @property
    def flip_rate(self) -> float | None:
        """Mask bits that the last update changed / masked weights; None before the first. Reads from the device."""
        return None if self._n_flipped is None else int(self._n_flipped) / self.n_masked

    @property
    def density_now(self) -> float:
        """Active / masked weights as they stand; other than `density` only while a cap is approached."""
        return self._n_now_active / self.n_masked

    def update(self) -> MaskUpdate:
        """Prune and grow now. A newly active weight starts at 0, a pruned and regrown one keeps its value.

        Raises RanksDiverged where several processes train together and no longer have one mask.
        """
        if not self._rule.moves:
            raise UsageError(
                f"An update was asked for, and the method is {self.method!r}, whose masks never move.",
                do="Leave it out, or choose another method.",
            )
        for do in self._before_update:
            do()
        before, self._n_cap = self._n_cap, self._layers.n_at(self.n_steps)
        rate = self.last_prune_rate = self.prune_rate
        update = self._decided(rate, is_cut=self._n_cap != before)
        flips = [torch.count_nonzero(mask ^ self.masks[name]) for name, mask in update.masks.items()]
        self._n_flipped = torch.stack(flips).sum()
        if self._rule.forgets:
            born = {name: mask & ~self.masks[name] for name, mask in update.masks.items()}
            forget_momentum(self.optimizer, self._layers.parameters, born)
        self._pass.set(update.masks)
        self.apply_masks()
        self.n_updates += 1
        if self.has_pattern:
            self._calm = self._calm.after(int(self._n_flipped), same_cap=self._n_cap == before)
        self._require_same_masks()
        return update

    def _is_last_cut(self) -> bool:
        """Is this the step at which gradual pruning has to arrive?"""
        return self._rule.is_gradual and self.n_steps == self._schedule.end

    def _decided(self, rate: float, *, is_cut: bool) -> MaskUpdate:
        """What the method prunes and grows now. is_cut: the pattern's cap has just become smaller."""
        if self._rule.is_gradual:
            self._n_now_active = n_active_gradually(
                self.n_masked,
                self._n_now_active,
                step=self.n_steps,
                end=self._schedule.end,
                n_last=self.n_active,
            )
            return pruned_gradually(
                self._layers, self.masks, self._rule, n_active=self._n_now_active, start=self._start
            )
        self._n_now_active = self._layers.n_active(self._n_cap)
        update = swapped(
            self._layers,
            self.masks,
            self._rule,
            self.optimizer,
            prune_rate=rate,
            n=self._n_cap,
            is_cut=is_cut,
            threshold=self._threshold,
            seed=self.seed,
            step=self.n_steps,
        )
        self._threshold = update.threshold
        return update

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
        """Masks and position in the schedule; weights and optimiser state are saved by their owners.

        Where growth goes by the gradient, that of the last step too: an update may come next.
        """
        gradients = None
        if self._rule.growth == "gradient":
            found = {name: value.grad for name, value in self._layers.parameters.items()}
            gradients = {name: value for name, value in found.items() if value is not None}
        return MaskState(
            masks=self.masks,
            n_steps=self.n_steps,
            n_updates=self.n_updates,
            calm=self._calm,
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
        self.last_prune_rate, self._calm = saved.last_prune_rate, saved.calm
        self._n_flipped = None if saved.n_flipped is None else torch.tensor(saved.n_flipped)
        self._n_cap = self._layers.n_at(self.n_steps)
        self._n_now_active = sum(int(mask.sum()) for mask in saved.masks.values())
        device = next(iter(self.masks.values())).device
        self._threshold = (
            None
            if saved.threshold is None
            else torch.tensor(saved.threshold, dtype=torch.float64, device=device)
        )
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
        test: Accuracy | None = None,
    ) -> Run:
        """Write the network as it stands as a finished run folder, ready for `sparse_export.build`.

        model: a known name or `package.module:factory`, by which the network can be made again; without it only
        the run returned here, which still holds the network, can be built.
        input_shape: of one sample; by default that of the first batch that went through the network.
        Raises UsageError when the shape is not known, or when the folder holds something already; OutputError.
        """
        return save_user_run(Path(path), self, self._seen, model=model, input_shape=input_shape, test=test)
