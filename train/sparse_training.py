"""Sparse momentum, and the methods it is compared with, around anybody's training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_export.artefact import Accuracy, LayerFact, ModelFact, Run
from sparse_export.errors import UsageError
from sparse_export.sparsity import (
    Cap,
    Distribution,
    MaskUpdate,
    NMPattern,
    Prune,
    PruneSchedule,
    Redistribution,
    gradual_density,
    layer_counts,
    pattern_from_text,
    prune_masks,
    prune_rate,
    random_masks,
    update_masks,
)
from sparse_export.sparsity.eligible import SMALL_SHARE
from sparse_export.sparsity.pattern import obeys
from sparse_export.sparsity.prune import FIRST_THRESHOLD
from sparse_export.sparsity.update import joined
from sparse_export.train.both_axes import (
    drawn_both_ways,
    only,
    require_both_ways,
    swapped_both_ways,
    weights_both_ways,
)
from sparse_export.train.distributed import masks_sha256, require_same_masks
from sparse_export.train.growth import forget_momentum, gradient_scores, random_scores
from sparse_export.train.layers import maskable_parameters, masked_parameters
from sparse_export.train.mask_pass import MaskPass
from sparse_export.train.methods import Growth, Method, chosen_method
from sparse_export.train.momentum import growth_scores, require_optimizer
from sparse_export.train.pattern_plan import PatternPlan, plan_pattern

# A prune rate under a pattern is multiplied by this when an update changes no fewer mask bits than the one before.
_CALM = 0.7


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
        rule = chosen_method(method, prune=prune, redistribution=redistribution, growth=growth)
        if not rule.moves and freeze is not None:
            raise UsageError(
                f"freeze is {freeze}, and the method is {method!r}, whose masks never move.",
                do="Leave out freeze, or choose another method.",
            )
        freeze = rule.freeze if freeze is None else freeze
        _require_start_of(method, rule, masks, pattern, total_steps if freeze > 0 else None)
        if density is None and pattern is None and masks is None:
            raise UsageError(
                "Neither a density nor a pattern was given.", expected="At least one was expected."
            )
        if density is not None and not 0 < density <= 1:
            raise UsageError(f"density is {density}.", expected="A number above 0 and up to 1 was expected.")
        for name, rate in (
            ("prune_rate", prune_rate),
            ("final_prune_rate", 0.0 if final_prune_rate is None else final_prune_rate),
            ("freeze", freeze),
            ("small_share", small_share),
        ):
            if not 0 <= rate <= 1:
                raise UsageError(f"{name} is {rate}.", expected="A number from 0 to 1 was expected.")
        for name, value in (("total_steps", total_steps), ("update_every", update_every)):
            if value is not None and value < 1:
                raise UsageError(
                    f"{name} is {value}.", expected="A number of steps, 1 or more, was expected."
                )
        for name, choice, kind in (
            ("start", start, Distribution),
            ("prune_schedule", prune_schedule, PruneSchedule),
        ):
            if choice is not None and choice not in get_args(kind):
                raise UsageError(
                    f"{name} is {choice!r}.", expected=f"One of {', '.join(get_args(kind))} was expected."
                )
        if prune_schedule in ("cosine", "linear") and total_steps is None:
            raise UsageError(
                f"prune_schedule={prune_schedule!r} needs to know how long training lasts.",
                do="Give total_steps, or choose prune_schedule='constant'.",
            )
        _require_approach(approach, freeze, pattern)
        self.model = model
        self.optimizer = optimizer
        self.method, self._rule = method, rule
        self._start, self.seed = start, seed
        self.total_steps = total_steps
        self.update_every = update_every
        self.prune_schedule: PruneSchedule = prune_schedule or ("cosine" if total_steps else "constant")
        self.n_steps = 0
        self.n_updates = 0
        self._initial_rate = prune_rate
        self._final_rate = _final_rate(self.prune_schedule, prune_rate, final_prune_rate, rule)
        self._threshold: Tensor | None = None
        self._approach, self._freeze = approach, freeze
        self._calm, self._n_flipped_before = 1.0, -1
        self._n_flipped: Tensor | None = None
        self.last_prune_rate: float | None = None
        self._plan: PatternPlan | None = None
        if pattern is None:
            self._parameters = masked_parameters(model, keep_dense)
        else:
            self._plan = plan_pattern(
                pattern,
                model,
                keep_dense=keep_dense,
                outputs=output_layers,
                small_share=small_share,
                approach=approach,
                total_steps=total_steps,
            )
            self._parameters = {name: model.get_parameter(name) for name in self._plan.caps}
        self._both_ways = weights_both_ways(self._parameters, pattern, density, rule) if transposable else ()
        require_optimizer(optimizer, self._parameters, momentum=rule.reads_momentum)
        self.n_masked = sum(value.numel() for value in self._parameters.values())
        self._wanted = self._count(density, masks)
        self.n_active = self._count_with(pattern.n if pattern else 0)
        self.density = self.n_active / self.n_masked if density is None else density
        self._process_group = process_group
        self._before_update: list[Callable[[], None]] = []
        self._n_cap = self._n_now()
        first = self._first_masks(start, seed) if masks is None else self._given_masks(masks)
        self._n_now_active = sum(int(mask.sum()) for mask in first.values())
        self._pass = MaskPass(self._parameters, first)
        self.masks = self._pass.masks
        self.masks_sha256: str | None = None
        if rescale and masks is None:
            self._rescale()
        self.apply_masks()
        self._require_same_masks()
        self._input_shape: tuple[int, ...] | None = None
        self._n_classes: int | None = None
        self._shape_hook = model.register_forward_hook(self._note_shapes)

    def _count(self, density: float | None, masks: Mapping[str, Tensor] | None) -> int | None:
        """Active weights that were asked for; None for as many as the pattern allows. Raises UsageError."""
        if masks is not None:
            if density is not None:
                raise UsageError(
                    "Masks and a density were given.",
                    expected="One of them was expected: masks have a density.",
                )
            n_active = sum(int(mask.sum()) for mask in masks.values())
            if self._plan is not None and n_active > self._plan.capacity_with(self._plan.pattern.n):
                raise UsageError(
                    f"The masks keep {n_active} weights, and the pattern {self._plan.pattern} has room for "
                    f"{self._plan.capacity_with(self._plan.pattern.n)}.",
                    expected="Masks of no more weights than that were expected.",
                    do="Leave out the masks: training then starts with as many as the pattern allows.",
                )
            return n_active
        if density is None:
            return None
        n_active = round(density * self.n_masked)
        if n_active == 0:
            raise UsageError(
                f"Density {density} of {self.n_masked} weights is none at all.",
                expected=f"At least {1 / self.n_masked:.2g} was expected.",
            )
        if self._plan is not None and n_active > self._plan.capacity_with(self._plan.pattern.n):
            raise UsageError(
                f"Density {density} was asked for under the pattern {self._plan.pattern}.",
                expected=f"At most {self._plan.pattern.density:g} was expected, which is all that it allows.",
            )
        return n_active

    def _n_now(self) -> int:
        """The cap at this step; 0 where there is no pattern."""
        return self._plan.n_at(self.n_steps) if self._plan is not None else 0

    def _count_with(self, n: int) -> int:
        """Active weights while the cap is n of M."""
        if self._wanted is not None or self._plan is None:
            return self._wanted or 0
        return self._plan.capacity_with(n)

    def _caps(self) -> dict[str, Cap]:
        return self._plan.caps_with(self._n_cap) if self._plan is not None else {}

    @property
    def _is_two_four(self) -> bool:
        """Has the cap come down?"""
        return self._plan is not None and self._n_cap == self._plan.pattern.n

    def _first_masks(self, start: Distribution, seed: int) -> dict[str, Tensor]:
        shapes = {name: tuple(value.shape) for name, value in self._parameters.items()}
        if self._rule.is_gradual:
            return {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
        limits = self._plan.limits_with(self._n_cap) if self._plan is not None else {}
        counts = limits
        if self._wanted is not None:
            counts = layer_counts(shapes, self._wanted / self.n_masked, start, limits=limits)
        generator = torch.Generator().manual_seed(seed)
        drawn = random_masks(shapes, counts, generator, caps=self._caps())
        if self._is_two_four:
            for name in self._both_ways:
                drawn[name] = drawn_both_ways(shapes[name], generator)
        return drawn

    def _given_masks(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks to start with. Raises UsageError when they are others' or over the cap."""
        have = {name: tuple(value.shape) for name, value in self._parameters.items()}
        got = {name: tuple(mask.shape) for name, mask in masks.items()}
        if have != got:
            raise UsageError(f"The masks are for {got}.", expected=f"Masks for {have} were expected.")
        over = [
            name for name, cap in self._caps().items() if not obeys(masks[name].bool(), cap.axis, cap.pattern)
        ]
        if over:
            raise UsageError(
                f"The masks of {', '.join(over)} do not obey the pattern.",
                expected="Masks within the pattern were expected.",
                do="Leave out the masks, or keep the N largest weights of each group in them.",
            )
        require_both_ways(masks, self._both_ways)
        return {name: mask.bool() for name, mask in masks.items()}

    @torch.no_grad()
    def _rescale(self) -> None:
        for name, weight in self._parameters.items():
            density = int(self.masks[name].sum()) / weight.numel()
            if density > 0:
                weight.mul_(1 / math.sqrt(density))

    def _note_shapes(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Remember what one sample looks like, once, so that a run can be exported. Never within torch.compile."""
        if torch.compiler.is_compiling():
            return
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            self._input_shape = tuple(inputs[0].shape[1:])
            self._n_classes = output.shape[-1]
        self._shape_hook.remove()

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
        if self._n_now() != self._n_cap or self._is_last_cut():
            self.update()
            return
        every = self.update_every
        if every is None or self.n_steps % every or self.is_frozen:
            return
        if self.total_steps is None or self.n_steps + every <= self.total_steps:
            self.update()

    def next_update(self, every: int | None = None) -> int | None:
        """How many steps will be done when masks are next updated; None for never.

        every: of updates that are made from outside, where `update_every` is None. Nothing is known here of those that
        a pattern's approach or gradual pruning adds.
        """
        every = self.update_every or every
        if every is None or not self._rule.moves:
            return None
        at = (self.n_steps // every + 1) * every
        if self.total_steps is None:
            return at
        return at if at + every <= self.total_steps and at < self._freeze * self.total_steps else None

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
        return self._plan is not None

    @property
    def _end(self) -> int:
        """The step from which on masks stand still."""
        return math.ceil(self._freeze * self.total_steps) if self.total_steps is not None else 0

    def _is_last_cut(self) -> bool:
        """Is this the step at which gradual pruning has to arrive?"""
        return self._rule.is_gradual and self.n_steps == self._end

    @property
    def is_frozen(self) -> bool:
        """Do the masks stand still from now on?"""
        if not self._rule.moves:
            return True
        return self.total_steps is not None and self.n_steps >= self._freeze * self.total_steps

    @property
    def prune_rate(self) -> float:
        """The prune rate that an update would use now."""
        scheduled = prune_rate(
            self.n_steps,
            None if self.total_steps is None else max(1, round(self._freeze * self.total_steps)),
            initial=self._initial_rate,
            final=self._final_rate,
            schedule=self.prune_schedule,
        )
        return scheduled * self._calm

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
        before, self._n_cap = self._n_cap, self._n_now()
        rate = self.last_prune_rate = self.prune_rate
        is_cut = self._n_cap != before
        update = self._pruned_only() if self._rule.is_gradual else self._swapped(rate, is_cut=is_cut)
        flips = [torch.count_nonzero(mask ^ self.masks[name]) for name, mask in update.masks.items()]
        self._n_flipped = torch.stack(flips).sum()
        if self._rule.forgets:
            born = {name: mask & ~self.masks[name] for name, mask in update.masks.items()}
            forget_momentum(self.optimizer, self._parameters, born)
        self._pass.set(update.masks)
        self.apply_masks()
        self.n_updates += 1
        if self._plan is not None:
            self._calm_down(same_cap=self._n_cap == before)
        self._require_same_masks()
        return update

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self._parameters.items()}

    def _swapped(self, rate: float, *, is_cut: bool) -> MaskUpdate:
        """What the method prunes and grows now. is_cut: the cap has just become smaller."""
        rule = self._rule
        grown_by: dict[str, Tensor] | None = None
        if rule.growth == "random":
            grown_by = random_scores(self._parameters, self.seed, self.n_steps)
        elif rule.growth == "gradient":
            grown_by = gradient_scores(self._parameters)
        if rule.reads_momentum or grown_by is None:
            scores = growth_scores(self.optimizer, self._parameters)
        else:
            scores = grown_by
        if rule.prune == "threshold" and self._threshold is None:
            device = next(iter(self.masks.values())).device
            self._threshold = torch.full((), FIRST_THRESHOLD, dtype=torch.float64, device=device)
        n_active = self._n_now_active = self._count_with(self._n_cap)
        updates: list[MaskUpdate] = []
        others = list(self.masks)
        if self._both_ways and self._is_two_four:
            wanted = scores if grown_by is None else grown_by
            updates.append(
                swapped_both_ways(
                    self._weights(), wanted, self.masks, self._both_ways, prune_rate=rate, is_cut=is_cut
                )
            )
            others = [name for name in others if name not in self._both_ways]
            n_active -= sum(self.masks[name].numel() // 2 for name in self._both_ways)
        if others:
            updates.append(
                update_masks(
                    only(self._weights(), others),
                    only(scores, others),
                    only(self.masks, others),
                    prune_rate=rate,
                    redistribution=rule.redistribution,
                    prune=rule.prune,
                    threshold=self._threshold,
                    growth_scores=None if grown_by is None else only(grown_by, others),
                    caps={name: cap for name, cap in self._caps().items() if name in others},
                    n_active=n_active,
                )
            )
            self._threshold = updates[-1].threshold
        return updates[0] if len(updates) == 1 else joined(updates, list(self.masks))

    def _pruned_only(self) -> MaskUpdate:
        """The largest weights, as many as gradual pruning keeps at this step."""
        density = gradual_density(self.n_steps, self._end, self.n_active / self.n_masked)
        self._n_now_active = min(self._n_now_active, max(round(density * self.n_masked), self.n_active))
        shapes = {name: tuple(value.shape) for name, value in self._parameters.items()}
        return prune_masks(
            self._weights(),
            self.masks,
            n_active=self._n_now_active,
            prune=self._rule.prune,
            counts=layer_counts(shapes, self._n_now_active / self.n_masked, self._start),
        )

    def _calm_down(self, *, same_cap: bool) -> None:
        """Lower the prune rate where swaps do not get fewer by themselves: then weights come and go in turn."""
        n_flipped = -1 if self._n_flipped is None else int(self._n_flipped)
        if same_cap and 0 <= self._n_flipped_before <= n_flipped and n_flipped:
            self._calm *= _CALM
        self._n_flipped_before = n_flipped if same_cap else -1

    def _require_same_masks(self) -> None:
        """Where several processes train together: compare the masks. Raises RanksDiverged in each of them."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(self._process_group) > 1:
            self.masks_sha256 = masks_sha256(self.masks)
            require_same_masks(self.masks_sha256, self._process_group)

    def layer_facts(self) -> tuple[LayerFact, ...]:
        """Every weight that could be masked, with its active count. Reads from the device."""
        if self._plan is None:
            return layer_facts(self.model, self.masks)
        pattern = self._plan.pattern
        promised = dict.fromkeys(self.masks, str(pattern)) if self._n_cap == pattern.n else {}
        return layer_facts(self.model, self.masks, promised, self._plan.why_dense)

    @property
    def why_dense(self) -> dict[str, str]:
        """Under a pattern, the reason for each weight that it was not put on."""
        return dict(self._plan.why_dense) if self._plan is not None else {}

    def state_dict(self) -> dict[str, Any]:
        """Masks and position in the schedule; weights and optimiser state are saved by their owners.

        Where growth goes by the gradient, that of the last step too: an update may come next.
        """
        extra: dict[str, Any] = {}
        if self._rule.growth == "gradient":
            gradients = {name: value.grad for name, value in self._parameters.items()}
            extra["gradients"] = {name: value for name, value in gradients.items() if value is not None}
        if self._threshold is not None:
            extra["threshold"] = float(self._threshold)
        return extra | {
            "masks": dict(self.masks),
            "n_steps": self.n_steps,
            "n_updates": self.n_updates,
            "calm": self._calm,
            "last_prune_rate": self.last_prune_rate,
            "n_flipped": None if self._n_flipped is None else int(self._n_flipped),
            "n_flipped_before": self._n_flipped_before,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state. Raises UsageError when it belongs to other layers."""
        masks = state["masks"]
        have = {name: tuple(mask.shape) for name, mask in self.masks.items()}
        got = {name: tuple(mask.shape) for name, mask in masks.items()}
        if have != got:
            raise UsageError(
                f"The saved masks are for {got}.",
                expected=f"Masks for {have} were expected.",
                do="Use another file.",
            )
        self._pass.set(masks)
        self.n_steps = int(state["n_steps"])
        self.n_updates = int(state["n_updates"])
        self._calm = float(state["calm"])
        self.last_prune_rate = None if state["last_prune_rate"] is None else float(state["last_prune_rate"])
        n_flipped = state["n_flipped"]
        self._n_flipped = None if n_flipped is None else torch.tensor(int(n_flipped))
        self._n_flipped_before = int(state["n_flipped_before"])
        self._n_cap = self._n_now()
        self._n_now_active = sum(int(mask.sum()) for mask in masks.values())
        if "threshold" in state:
            device = next(iter(self.masks.values())).device
            self._threshold = torch.tensor(state["threshold"], dtype=torch.float64, device=device)
        for name, gradient in state.get("gradients", {}).items():
            value = self._parameters[name]
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
        from sparse_export.train.run_folder import save_user_run

        shape = tuple(input_shape) if input_shape is not None else self._input_shape
        if shape is None:
            raise UsageError(
                "The network has not seen a tensor yet, so the shape of its input is not known.",
                do="Give input_shape, for example input_shape=(1, 28, 28).",
            )
        if self._n_classes is None:
            with torch.no_grad():
                weight = next(iter(self._parameters.values()))
                probe = torch.zeros((1, *shape), dtype=weight.dtype, device=weight.device)
                was_training = self.model.training
                output = self.model.eval()(probe)
                self.model.train(was_training)
            if not isinstance(output, Tensor):
                raise UsageError(
                    f"The network answers with {type(output).__name__}.",
                    expected="One tensor of logits was expected.",
                    do="Wrap it in a module that returns its logits alone.",
                )
            self._n_classes = output.shape[-1]
        return save_user_run(
            Path(path),
            self,
            model=ModelFact(name=model, input_shape=shape, n_classes=self._n_classes),
            test=test,
        )


def _final_rate(schedule: PruneSchedule, initial: float, asked: float | None, rule: Method) -> float | None:
    """Where the prune rate ends: as asked, else by schedule and method. Raises UsageError for an end of `constant`."""
    if schedule == "constant":
        if asked is not None:
            raise UsageError(
                f"final_prune_rate is {asked}, and the prune schedule is 'constant'.",
                expected="No final_prune_rate was expected: that schedule stays at prune_rate.",
                do="Leave it out, or choose prune_schedule='cosine' or 'linear' with total_steps.",
            )
        return None
    if asked is None:
        asked = 0.0 if schedule == "linear" else rule.final_prune_rate
    return min(asked, initial)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel, DataParallel and torch.compile, in whatever order."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _require_start_of(
    name: str,
    method: Method,
    masks: Mapping[str, Tensor] | None,
    pattern: NMPattern | None,
    n_steps: int | None,
) -> None:
    """Raise UsageError where a method has not what it starts or goes by. n_steps: until masks freeze, if known."""
    if pattern is not None and method.start != "random":
        raise UsageError(
            f"The method is {name!r}, and there is a pattern, {pattern}.",
            expected="A method that starts with random masks was expected under a pattern.",
            do="Leave out the pattern, or choose another method; asp prunes a dense network to a pattern.",
        )
    if method.start == "sensitivity" and masks is None:
        raise UsageError(
            f"The method is {name!r}, and there are no masks.",
            expected="Those of sparse_export.train.snip.snip_masks were expected.",
        )
    if method.is_gradual and (masks is not None or n_steps is None):
        raise UsageError(
            f"The method is {name!r}, which goes from dense to sparse over the length of the training.",
            expected="total_steps, a freeze above 0 and no masks were expected.",
        )


def _require_approach(approach: tuple[float, float], freeze: float, pattern: NMPattern | None) -> None:
    """Raise UsageError for fractions that cannot be meant."""
    if not 0 <= approach[0] <= approach[1] <= freeze:
        raise UsageError(
            f"approach is {approach} and freeze is {freeze}.",
            expected="Two fractions of the training were expected, the second no earlier than the first and no "
            "later than freeze.",
        )
    if approach[1] > 0 and pattern is None:
        raise UsageError(
            f"approach is {approach}, and there is no pattern.", expected="One was expected with it."
        )


def layer_facts(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    promised: Mapping[str, str] | None = None,
    why_dense: Mapping[str, str] | None = None,
) -> tuple[LayerFact, ...]:
    """Every maskable weight of a network: kept entries by its mask, all of them where there is none.

    promised: the patterns that layers obey, by name.  why_dense: the reasons of those that got none.
    """
    return tuple(
        LayerFact(
            name=name,
            shape=tuple(value.shape),
            n_weights=value.numel(),
            n_active=int(masks[name].sum()) if name in masks else value.numel(),
            masked=name in masks,
            pattern=(promised or {}).get(name),
            why_dense=(why_dense or {}).get(name),
        )
        for name, value in maskable_parameters(model).items()
    )
