"""What optimizers remember of each weight: its momentum, read and forgotten."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparse_export.errors import UsageError

__all__ = ["MomentumOf", "OptimizerState"]

MomentumOf = Callable[[Optimizer, Tensor], Tensor | None]
"""Reads the momentum of a parameter, in its shape; None where there is none yet."""

_ADAM_EPSILON = 1e-8  # the reference's, whatever the optimizer's own eps is

_BUFFERS = ("SGD", "SGDW", "Muon", "MuonWithAuxAdam", "SingleDeviceMuonWithAuxAdam")
_MOMENTS = ("Adam", "AdamW", "NAdam", "NAdamW", "RAdam", "Lamb", "LAMB", "Lion")
_UPDATES = ("Adafactor", "AdafactorBigVision")
"""Classes by name, for some are in several libraries. The first keep a buffer `momentum_buffer` (Muon beside
Adam's moments for what is no matrix), the next Adam's moments or the first of them, the last a first moment
of updates that are normalised already, where they are told to."""

_STATISTICS = (
    "momentum_buffer",
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "exp_inf",
    "square_avg",
    "grad_avg",
)


class OptimizerState:
    """The state of the optimizers that train some parameters.

    Args:
        optimizers: of the training.
        parameters: the masked weights, by name.
        momentum_of: reads the momentum, in place of what is known of the optimizer's class.

    Raises:
        UsageError: no optimizer trains one of the parameters.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        parameters: Mapping[str, Tensor],
        momentum_of: MomentumOf | None = None,
    ) -> None:
        self._parameters, self._momentum_of = parameters, momentum_of
        owners = {
            id(value): (optimizer, group)
            for optimizer in optimizers
            for group in optimizer.param_groups
            for value in group["params"]
        }
        for name, value in parameters.items():
            if id(value) not in owners:
                raise UsageError(
                    f"{name} is not among the optimizer's parameters.",
                    expected="Every masked weight was expected to be trained.",
                    do="Give it to the optimizer, or name it in keep_dense.",
                )
        self._owners = {name: owners[id(value)] for name, value in parameters.items()}

    def require_momentum(self, without: Sequence[str]) -> None:
        """Raise UsageError where a momentum cannot be read, or none is kept.

        Args:
            without: the methods that read none, which the message names.
        """
        if self._momentum_of is not None:
            return
        instead = f"or choose a method that reads none: {', '.join(without)}"
        for optimizer, group in self._owners.values():
            name = type(optimizer).__name__
            known = _known(optimizer)
            if known is None:
                raise UsageError(
                    f"The momentum of {name} cannot be read.",
                    expected="SGD with momentum, Adam, AdamW, NAdam, RAdam, Lion, LAMB, Muon or an Adafactor "
                    "that keeps a first moment was expected.",
                    do=f"Give momentum_of, a function of the optimizer and a parameter, {instead}.",
                )
            if known in _UPDATES and group.get("beta1") is None and group.get("momentum") is None:
                raise UsageError(
                    f"This {name} keeps no first moment, so there is nothing to grow weights by.",
                    do=f"Set its beta1 or momentum where it has one, take another optimizer, {instead}.",
                )
            if known in _BUFFERS and not group.get("momentum", 1) > 0:
                raise UsageError(
                    f"{name} without momentum has nothing to grow weights by.",
                    expected="A momentum above 0 was expected.",
                    do=f"Use torch.optim.SGD(..., momentum=0.9), Adam or AdamW, {instead}.",
                )

    def require_read(self) -> None:
        """Raise UsageError where an optimizer stepped a weight and its momentum is not where it should be."""
        for name, value in self._parameters.items():
            optimizer, _ = self._owners[name]
            keys = [str(key) for key in optimizer.state.get(value, {})]
            if value.grad is not None and keys and self._read(name) is None:
                raise UsageError(
                    f"{type(optimizer).__name__} keeps {', '.join(keys)} of {name}, none of which is known "
                    "as its momentum.",
                    do="Give momentum_of, a function of the optimizer and a parameter.",
                )

    def momentum(self) -> dict[str, Tensor]:
        """The momentum of every weight, by name, in its shape.

        SGD and Muon: the momentum buffer. Adam and its kin: exp_avg / (sqrt(exp_avg_sq) + 1e-8), without bias
        correction, as the reference has it. Lion and Adafactor: exp_avg. Where weights are trained by
        different rules, whose momenta have different units, those of each rule are divided by their mean
        magnitude: layers can then be compared.

        Raises:
            UsageError: the optimizer has not made a step with one of them yet, or momentum_of gives what is
                no momentum of a weight.
        """
        scores, rules = {}, {}
        for name in self._parameters:
            found = self._read(name)
            if found is None:
                raise UsageError(
                    f"The optimizer holds no momentum for {name} yet.",
                    expected="A mask update comes after at least one optimizer step in which the weight had "
                    "a gradient.",
                    do="Name it in keep_dense where it is not used in training.",
                )
            scores[name], rules[name] = found
        if len(set(rules.values())) > 1:
            for rule in set(rules.values()):
                names = [name for name in scores if rules[name] == rule]
                total = torch.stack([scores[name].abs().sum(dtype=torch.float64) for name in names]).sum()
                mean = total / sum(scores[name].numel() for name in names)
                for name in names:
                    scores[name] = scores[name] / torch.where(mean > 0, mean, 1).to(scores[name].dtype)
        return scores

    @torch.no_grad()
    def forget(self, born: Mapping[str, Tensor]) -> None:
        """Zero the optimizer's statistics of weights that are grown, in place.

        A weight that is inactive, and whose momentum is zeroed when it is grown, trains as if its gradient
        had been masked all along, which is how these methods save the dense gradient.

        Args:
            born: bool, by name; True where a weight is grown.
        """
        for name, value in self._parameters.items():
            optimizer, _ = self._owners[name]
            state = optimizer.state.get(value, {})
            for key in _STATISTICS:
                if isinstance(state.get(key), Tensor) and state[key].shape == value.shape:
                    state[key].masked_fill_(born[name], 0)

    def _read(self, name: str) -> tuple[Tensor, str] | None:
        """The momentum of a weight and the rule that it is of; None before there is one."""
        value, (optimizer, _) = self._parameters[name], self._owners[name]
        if self._momentum_of is not None:
            given = self._momentum_of(optimizer, value)
            if given is not None:
                _require_like(name, value, given)
            return None if given is None else (given.detach(), "momentum_of")
        state = optimizer.state.get(value, {})
        known = _known(optimizer)
        buffer, first, second = (state.get(key) for key in ("momentum_buffer", "exp_avg", "exp_avg_sq"))
        if buffer is not None:
            return buffer, f"buffer of {known}"
        if first is None:
            return None
        if second is None or known in _UPDATES:
            return first, f"first moment of {known}"
        return first / (second.sqrt() + _ADAM_EPSILON), "normalised"


def _known(optimizer: Optimizer) -> str | None:
    """The name of its class, or of one that it is derived from, whose state is known."""
    names = (kind.__name__ for kind in type(optimizer).__mro__)
    return next((name for name in names if name in (*_BUFFERS, *_MOMENTS, *_UPDATES)), None)


def _require_like(name: str, value: Tensor, given: Any) -> None:
    """Raise UsageError for what is no momentum of a weight."""
    if not isinstance(given, Tensor) or given.shape != value.shape or not given.is_floating_point():
        is_tensor = isinstance(given, Tensor)
        what = f"{given.dtype} of shape {tuple(given.shape)}" if is_tensor else type(given).__name__
        raise UsageError(
            f"momentum_of gives {what} for {name}.",
            expected=f"A tensor of floats of shape {tuple(value.shape)} was expected, or None.",
        )
