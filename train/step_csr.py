"""A training step on the CPU without inactive weights, but for a window before each mask update."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from sparse_export.errors import UsageError
from sparse_export.models.layers_csr import WeightCsr, change_linears, why_not_linear
from sparse_export.sparsity.csr import CsrForm, gather, scatter
from sparse_export.train.csr_choice import MOST_DENSITY
from sparse_export.train.sparsifier import CsrTrainer

__all__ = ["StepCsr", "default_window"]

_FORGOTTEN = 0.01  # what the default window leaves of a momentum from before it


class StepCsr:
    """Makes the products of Linear layers in training sparse, and their optimizer's work with them.

        trainer = SparseTraining(model, optimizer, density=0.05, total_steps=10_000)
        chosen = choose_products(model, trainer.masks, sample)
        products = StepCsr(model, trainer, layers=[fact.name for fact in chosen if fact.by == "csr"])
        ...
        loss.backward()
        trainer.step()
        products.after_step()

    Forward products and gradients of inputs always go by active weights. Between mask updates the gradient of
    a weight does too: the optimizer then holds the active weights alone, in one flat parameter, and its step
    is the dense masked one's on them. For `window` steps before an update the optimizer holds the whole
    weight again, whose gradient is dense, so that growth sees inactive weights. What an inactive weight
    gathered in earlier windows meanwhile decays as under zero gradients (momentum, Adam's first moment), or
    stands still (Adam's second moment, for which zero would be no estimate).

    While active weights are apart, `weight` of a changed layer stands still: `state_dict()` of the network
    and of the optimizer bring it up to date and have the ordinary shapes; otherwise call `sync` before
    reading it. States are loaded before this is made. `restore` ends it all and gives the plain layers back.

    Make it after the network is on the CPU and the trainer is made or has loaded its state. No
    DistributedDataParallel, torch.compile or autocast.

    Args:
        model: the network.
        trainer: as `SparseTraining`.
        layers: names of the weights, see `sparse_export.train.csr_choice.choose_products`.
        window: steps, at least 1; None for `default_window`. As long as an update interval, or longer:
            gradients are always dense.
        update_every: of updates that the loop makes itself, where the trainer's own `update_every` is None.
            `after_step` is then called after each of them too.
        most_density: a layer whose mask has grown denser is multiplied densely until the next update.

    Raises:
        UsageError: the masks, the optimizer or a layer cannot be trained so.
    """

    def __init__(
        self,
        model: nn.Module,
        trainer: CsrTrainer,
        *,
        layers: Collection[str],
        window: int | None = None,
        update_every: int | None = None,
        most_density: float = MOST_DENSITY,
    ) -> None:
        _require_possible(model, trainer, layers, update_every)
        if window is not None and window < 1:
            raise UsageError(f"The window is {window} steps.", expected="1 or more was expected.")
        self._model, self._trainer = model, trainer
        self._optimizer = trainer.optimizer
        self.window = default_window(trainer, layers) if window is None else window
        self._every = update_every
        self._most_density = most_density
        self.layers = change_linears(model, [name for name in trainer.masks if name in layers])
        self._apart: dict[str, _Apart] = {}
        self._since = 0
        self._seen = -1
        self._handles: list[Any] = []
        self._leave_updates = trainer.before_update(self.widen)
        self._handles.append(self._optimizer.register_state_dict_pre_hook(self._show_dense))
        self._handles.append(self._optimizer.register_state_dict_post_hook(self._show_apart))
        self._handles.append(self._optimizer.register_load_state_dict_pre_hook(self._refuse_load))
        self.after_step()
        every = trainer.update_every or update_every
        if self._apart and every:
            self._since = trainer.n_steps // every * every  # where a state was loaded, they parted then

    @property
    def sparse_layers(self) -> tuple[str, ...]:
        """Weights whose products are sparse at the moment."""
        return tuple(name for name, layer in self.layers.items() if layer.form is not None)

    @property
    def is_narrow(self) -> bool:
        """Does the next step train active weights alone?"""
        return bool(self._apart)

    def after_step(self) -> None:
        """After every step, and every update from outside: see that the next step trains what it has to.

        Gradients of weights that are apart are cleared: `model.zero_grad()` does not see them.
        """
        for apart in self._apart.values():
            apart.values.grad = None
        if self._trainer.n_updates != self._seen:
            self.widen()
            self._seen = self._trainer.n_updates
            for name, layer in self.layers.items():
                mask = self._trainer.masks[name]
                is_sparse = int(torch.count_nonzero(mask)) <= self._most_density * mask.numel()
                layer.set_mask(mask if is_sparse else None)
        at = self._trainer.next_update(self._every)
        if at is None or self._trainer.n_steps < at - self.window:
            self.narrow()
        else:
            self.widen()

    @torch.no_grad()
    def narrow(self) -> None:
        """Train active weights alone from now on, unless that is so. `after_step` decides anew."""
        if self._apart:
            return
        for name in self.sparse_layers:
            layer = self.layers[name]
            assert layer.form is not None
            values = layer.take_apart()
            layer.weight.grad = None
            kept = self._optimizer.state.pop(layer.weight, {})
            state = {key: _gathered(layer.form, entry, layer.weight) for key, entry in kept.items()}
            self._apart[name] = _Apart(layer=layer, values=values, form=layer.form, kept=kept)
            self._put(layer.weight, values, state)
        self._since = self._trainer.n_steps
        self._trainer.rest(self._apart)

    @torch.no_grad()
    def widen(self) -> None:
        """Train whole weights from now on; does nothing where that is so. `after_step` decides anew."""
        if not self._apart:
            return
        n_steps = self._trainer.n_steps - self._since
        for apart in self._apart.values():
            state = self._optimizer.state.pop(apart.values, {})
            group = self._group(apart.values)
            for key, decay in _decays(group).items():
                if n_steps and isinstance(apart.kept.get(key), Tensor):
                    apart.kept[key].mul_(decay**n_steps)
            self._put(apart.values, apart.layer.weight, apart.whole(state))
            apart.layer.put_together()
        self._apart = {}
        self._trainer.rest(())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """These products are in the weights' own type, so they go on."""
        yield

    def sync(self) -> None:
        """Bring the changed layers' weights up to date."""
        for layer in self.layers.values():
            layer.sync()

    def restore(self) -> None:
        """Give the network its plain layers back, and the optimizer their weights, for good."""
        self.widen()
        for name, layer in self.layers.items():
            layer.set_mask(None)
            owner = self._model.get_submodule(name.rpartition(".")[0])
            object.__setattr__(owner, "__class__", nn.Linear)
            object.__delattr__(owner, "product")
            if layer.hook is not None:
                layer.hook.remove()
        self.layers = {}
        for handle in self._handles:
            handle.remove()
        self._leave_updates()

    def _group(self, parameter: Tensor) -> dict[str, Any]:
        return next(
            group
            for group in self._optimizer.param_groups
            if any(value is parameter for value in group["params"])
        )

    def _put(self, old: Tensor, new: Tensor, state: dict[str, Any]) -> None:
        """Give the optimizer another parameter, in the same place of the same group, with its state."""
        group = self._group(old)
        group["params"] = [new if value is old else value for value in group["params"]]
        self._optimizer.state.pop(old, None)
        if state:
            self._optimizer.state[new] = state

    @torch.no_grad()
    def _show_dense(self, optimizer: Optimizer) -> None:
        """Whole weights while a state is read. What inactive ones gathered is not decayed in it yet."""
        for apart in self._apart.values():
            apart.shown = optimizer.state.pop(apart.values, {})
            self._put(apart.values, apart.layer.weight, apart.whole(apart.shown))

    @torch.no_grad()
    def _show_apart(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        for apart in self._apart.values():
            self._put(apart.layer.weight, apart.values, apart.shown)
            apart.shown = {}

    def _refuse_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        if self._apart:
            raise UsageError(
                "A state is being loaded into an optimizer that holds active weights alone.",
                expected="States were expected to be loaded before StepCsr is made.",
                do="Call restore(), load, and make another StepCsr.",
            )


@dataclass(kw_only=True)
class _Apart:
    """A layer whose active weights are trained apart.

    Args:
        layer: with its whole weight.
        values: the active weights, in one flat parameter.
        form: where they lie in the whole weight.
        kept: the optimizer's state of the whole weight, in which inactive weights wait.
        shown: the active weights' state while an optimizer's state is being read.
    """

    layer: WeightCsr
    values: nn.Parameter
    form: CsrForm
    kept: dict[str, Any]
    shown: dict[str, Any] = field(default_factory=dict)

    def whole(self, state: dict[str, Any]) -> dict[str, Any]:
        """The whole weight's state: that of active weights, put among the inactive ones, in place."""
        for key, entry in state.items():
            if not isinstance(entry, Tensor) or entry.shape != self.values.shape:
                self.kept[key] = entry
                continue
            if key not in self.kept:
                self.kept[key] = torch.zeros_like(self.layer.weight, dtype=entry.dtype, requires_grad=False)
            scatter(self.form, entry, self.kept[key])
        return self.kept


def default_window(trainer: CsrTrainer, layers: Collection[str]) -> int:
    """Steps of dense gradients before an update that growth can go by.

    Where it goes by momentum β: ln(100) / (1 - β), after which a hundredth is left of what was there before
    (Adam's first moment counts). Where it goes by the gradient, or by none: 1.
    """
    growth = trainer.rule.growth
    if growth is None or not growth.reads_momentum:
        return 1
    weights = {id(trainer.model.get_parameter(name)) for name in layers}
    betas = [
        max(_decays(group).values(), default=0.0)
        for group in trainer.optimizer.param_groups
        if any(id(value) in weights for value in group["params"])
    ]
    return math.ceil(math.log(1 / _FORGOTTEN) / (1 - max(betas, default=0.0)))


def _decays(group: dict[str, Any]) -> dict[str, float]:
    """What a step with a zero gradient multiplies a statistic by, by its name in the optimizer's state."""
    if "betas" in group:
        return {"exp_avg": float(group["betas"][0])}
    return {"momentum_buffer": float(group.get("momentum", 0.0))}


def _gathered(form: CsrForm, entry: Any, weight: Tensor) -> Any:
    if isinstance(entry, Tensor) and entry.shape == weight.shape:
        return gather(form, entry)
    return entry


def _require_possible(
    model: nn.Module, trainer: CsrTrainer, layers: Collection[str], update_every: int | None
) -> None:
    rule = trainer.rule
    if trainer.has_pattern or trainer.density_falls:
        raise UsageError(
            "CSR products were asked for "
            + ("under a pattern." if trainer.has_pattern else f"with the method {rule.name!r}."),
            expected="Masks without a pattern, which do not start dense, were expected.",
        )
    names = [type(optimizer).__name__ for optimizer in trainer.optimizers]
    if len(names) > 1 or type(trainer.optimizer) not in (SGD, Adam, AdamW):
        raise UsageError(
            f"CSR products were asked for with {' and '.join(names)}.",
            expected="One of SGD, Adam and AdamW was expected, which step each weight by itself.",
        )
    if rule.moves and trainer.update_every is None and update_every is None:
        raise UsageError(
            "Masks are updated from outside, and update_every is not given.",
            do="Give it: gradients have to be dense before an update.",
        )
    reasons = why_not_linear(model)
    for name in layers:
        if name not in trainer.masks:
            reasons[name] = "it is no masked weight of the network"
        if name in reasons:
            raise UsageError(
                f"{name} cannot be multiplied by CSR: {reasons[name]}.",
                expected="Names of masked weights of Linear layers on the CPU were expected.",
                do="See sparse_export.train.csr_choice.choose_products.",
            )
    if not layers:
        raise UsageError(
            "No layer was named for CSR products.",
            expected="At least one was expected.",
            do="Train with dense products.",
        )
