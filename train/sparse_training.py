"""Sparse momentum around anybody's training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_export.artefact import Accuracy, LayerFact, ModelFact, Run
from sparse_export.errors import UsageError
from sparse_export.sparsity import (
    Distribution,
    MaskUpdate,
    PruneSchedule,
    Redistribution,
    layer_counts,
    prune_rate,
    random_masks,
    update_masks,
)
from sparse_export.train.distributed import masks_sha256, require_same_masks
from sparse_export.train.layers import maskable_parameters, masked_parameters
from sparse_export.train.mask_pass import MaskPass
from sparse_export.train.momentum import growth_scores, require_momentum


class SparseTraining:
    """Keeps a network sparse while a user's own loop trains it.

        trainer = SparseTraining(model, optimizer, density=0.05, total_steps=10_000)
        ...
        loss.backward()
        trainer.step()                       # in place of optimizer.step()

    model: on the device that it is trained on; one wrapped by DistributedDataParallel or torch.compile counts as
    the network inside.  optimizer: SGD with momentum, Adam or AdamW over its parameters.
    density: kept / total over the masked weights, 0 < density <= 1; held exactly from the start to the end.
    total_steps: length of the training, which the prune rate falls over; without it the rate stays constant.
    update_every: masks are updated after so many steps, never within the last such stretch before total_steps;
    None: only when `update` is called.
    prune_rate: at the start.  prune_schedule: `cosine` (the default when total_steps is given), `linear`,
    `constant`.  redistribution: see `sparse_export.sparsity.update_masks`.
    start: how the first masks are spread over the layers, see `sparse_export.sparsity.layer_counts`.
    rescale: multiply a layer's start weights by 1 / sqrt(its density), which keeps the variance of its outputs.
    keep_dense: shell patterns of parameters or layers that stay dense and are not counted.
    seed: of the first masks.
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
        density: float,
        total_steps: int | None = None,
        update_every: int | None = 500,
        prune_rate: float = 0.5,
        final_prune_rate: float = 0.005,
        prune_schedule: PruneSchedule | None = None,
        redistribution: Redistribution = "momentum",
        start: Distribution = "erdos-renyi",
        rescale: bool = True,
        keep_dense: Sequence[str] = (),
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        model = unwrapped(model)
        if not 0 < density <= 1:
            raise UsageError(f"density is {density}.", expected="A number above 0 and up to 1 was expected.")
        for name, rate in (("prune_rate", prune_rate), ("final_prune_rate", final_prune_rate)):
            if not 0 <= rate <= 1:
                raise UsageError(f"{name} is {rate}.", expected="A number from 0 to 1 was expected.")
        for name, value in (("total_steps", total_steps), ("update_every", update_every)):
            if value is not None and value < 1:
                raise UsageError(
                    f"{name} is {value}.", expected="A number of steps, 1 or more, was expected."
                )
        for name, choice, kind in (
            ("start", start, Distribution),
            ("redistribution", redistribution, Redistribution),
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
        self.model = model
        self.optimizer = optimizer
        self.density = density
        self.total_steps = total_steps
        self.update_every = update_every
        self.prune_schedule: PruneSchedule = prune_schedule or ("cosine" if total_steps else "constant")
        self.n_steps = 0
        self.n_updates = 0
        self._initial_rate = prune_rate
        self._final_rate = min(final_prune_rate, prune_rate)
        self._redistribution = redistribution
        self._parameters = masked_parameters(model, keep_dense)
        require_momentum(optimizer, self._parameters)
        self.n_masked = sum(value.numel() for value in self._parameters.values())
        self.n_active = round(density * self.n_masked)
        if self.n_active == 0:
            raise UsageError(
                f"Density {density} of {self.n_masked} weights is none at all.",
                expected=f"At least {1 / self.n_masked:.2g} was expected.",
            )
        self._process_group = process_group
        self._pass = MaskPass(self._parameters, self._first_masks(start, seed))
        self.masks = self._pass.masks
        self.masks_sha256: str | None = None
        if rescale:
            self._rescale()
        self.apply_masks()
        self._require_same_masks()
        self._input_shape: tuple[int, ...] | None = None
        self._n_classes: int | None = None
        self._shape_hook = model.register_forward_hook(self._note_shapes)

    def _first_masks(self, start: Distribution, seed: int) -> dict[str, Tensor]:
        shapes = {name: tuple(value.shape) for name, value in self._parameters.items()}
        counts = layer_counts(shapes, self.density, start)
        return random_masks(shapes, counts, torch.Generator().manual_seed(seed))

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
        every = self.update_every
        if every is None or self.n_steps % every:
            return
        if self.total_steps is None or self.n_steps + every <= self.total_steps:
            self.update()

    @property
    def prune_rate(self) -> float:
        """The prune rate that an update would use now."""
        return prune_rate(
            self.n_steps,
            self.total_steps,
            initial=self._initial_rate,
            final=self._final_rate,
            schedule=self.prune_schedule,
        )

    def update(self) -> MaskUpdate:
        """Prune and grow now. A newly active weight starts at 0, a pruned and regrown one keeps its value.

        Raises RanksDiverged where several processes train together and no longer have one mask.
        """
        update = update_masks(
            {name: value.detach() for name, value in self._parameters.items()},
            growth_scores(self.optimizer, self._parameters),
            self.masks,
            prune_rate=self.prune_rate,
            redistribution=self._redistribution,
        )
        self._pass.set(update.masks)
        self.apply_masks()
        self.n_updates += 1
        self._require_same_masks()
        return update

    def _require_same_masks(self) -> None:
        """Where several processes train together: compare the masks. Raises RanksDiverged in each of them."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(self._process_group) > 1:
            self.masks_sha256 = masks_sha256(self.masks)
            require_same_masks(self.masks_sha256, self._process_group)

    def layer_facts(self) -> tuple[LayerFact, ...]:
        """Every weight that could be masked, with its active count. Reads from the device."""
        return layer_facts(self.model, self.masks)

    def state_dict(self) -> dict[str, Any]:
        """Masks and position in the schedule; weights and optimiser state are saved by their owners."""
        return {"masks": dict(self.masks), "n_steps": self.n_steps, "n_updates": self.n_updates}

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


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel, DataParallel and torch.compile, in whatever order."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def layer_facts(model: nn.Module, masks: dict[str, Tensor]) -> tuple[LayerFact, ...]:
    """Every maskable weight of a network: kept entries by its mask, all of them where there is none."""
    return tuple(
        LayerFact(
            name=name,
            shape=tuple(value.shape),
            n_weights=value.numel(),
            n_active=int(masks[name].sum()) if name in masks else value.numel(),
            masked=name in masks,
        )
        for name, value in maskable_parameters(model).items()
    )
