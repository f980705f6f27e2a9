"""The steps of the optimizers of one training: made here or in somebody's loop, and counted."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self
from weakref import WeakMethod, WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparse_export.errors import UsageError

__all__ = ["Attachment", "OptimizerSteps", "StepCount"]

_ATTACHED: WeakSet[Optimizer] = WeakSet()


class StepCount:
    """Counts steps. Whether a fused optimizer skipped one stands on the device, and is read when it matters.

    Args:
        n: steps so far.
    """

    def __init__(self, n: int = 0) -> None:
        self._n = n
        self._skipped: Tensor | None = None

    @property
    def most(self) -> int:
        """The steps, with those that may turn out to have been skipped."""
        return self._n

    def add(self, found_inf: Tensor | None = None) -> None:
        """Count a step. found_inf: of one element; the step was skipped where that is not 0."""
        self._n += 1
        if found_inf is not None:
            skipped = torch.count_nonzero(found_inf.detach())
            self._skipped = skipped if self._skipped is None else self._skipped + skipped

    def settled(self) -> int:
        """The steps that were made. Reads from the device where one of them may have been skipped."""
        if self._skipped is not None:
            self._n -= int(self._skipped)
            self._skipped = None
        return self._n


class Attachment:
    """Hooks on the steps of optimizers, until it is detached; a context manager too.

    A step that a GradScaler leaves out calls no hook. One that a fused optimizer leaves out by itself does:
    the scaler has then put `found_inf` on the optimizer.

    Args:
        optimizers: of torch; the last one is that whose steps count.
        apply: is called after each step of the others, and of each while a CUDA graph is captured.
        after_step: is called after each step of the last, with its found_inf where there is one.
        before_step: is called before each step of the first, but not while a CUDA graph is captured.

    Raises:
        UsageError: one of them is attached already.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        apply: Callable[[], None],
        after_step: Callable[[Tensor | None], None],
        before_step: Callable[[], None],
    ) -> None:
        if any(optimizer in _ATTACHED for optimizer in optimizers):
            raise UsageError(
                "The optimizer is attached already: masks of two trainers would be applied.",
                do="Call detach() of the trainer that it is attached to, or make a new optimizer.",
            )
        self._optimizers, self._apply, self._after_step = tuple(optimizers), apply, after_step
        self._before_step = before_step
        self._handles = [optimizer.register_step_post_hook(self._stepped) for optimizer in optimizers]
        self._handles.append(optimizers[0].register_step_pre_hook(self._steps_now))
        _ATTACHED.update(optimizers)

    @property
    def is_active(self) -> bool:
        """Are the hooks in place?"""
        return bool(self._handles)

    def detach(self) -> None:
        """Take the hooks away; does nothing where that is so."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        _ATTACHED.difference_update(self._optimizers)
        self._optimizers = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _steps_now(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not _is_captured():
            self._before_step()

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if _is_captured() or optimizer is not self._optimizers[-1]:
            self._apply()
        else:
            self._after_step(getattr(optimizer, "found_inf", None))


class OptimizerSteps:
    """Makes steps of one or several optimizers, which its owner may also leave to somebody's loop.

    Args:
        given: an optimizer, or several in the order in which they step; those of accelerate and lightning
            count as the one inside.

    Attributes:
        optimizers: of torch.
        given: as they were given.
        count: of the steps.

    Raises:
        UsageError: something else was given, or nothing.
    """

    def __init__(self, given: Optimizer | Sequence[Optimizer]) -> None:
        several = given if isinstance(given, Sequence) else [given]
        self.given = tuple(several)
        self.optimizers = tuple(_unwrapped(one) for one in self.given)
        if not self.given:
            raise UsageError("No optimizer was given.", expected="At least one was expected.")
        self.count = StepCount()
        self._attachment: Attachment | None = None
        self._is_mine = self._sees_outside = False
        self._n_outside = self._n_doubled = 0
        alive = WeakMethod(self._stepped)  # the optimizer may outlive its trainer

        def stepped(*_: Any) -> None:
            note = alive()
            if note is not None:
                note()

        self.optimizers[-1].register_step_post_hook(stepped)

    @property
    def is_attached(self) -> bool:
        """Does somebody's loop make the steps, and hooks the rest?"""
        return self._attachment is not None and self._attachment.is_active

    def attach(
        self,
        apply: Callable[[], None],
        after_step: Callable[[Tensor | None], None],
        before_step: Callable[[], None],
    ) -> Attachment:
        """Put hooks on the steps. See `Attachment`."""
        self._attachment = Attachment(self.optimizers, apply, after_step, before_step)
        return self._attachment

    def detach(self) -> None:
        """Take the hooks away; does nothing where there are none."""
        if self._attachment is not None:
            self._attachment.detach()
        self._attachment = None

    def _stepped(self) -> None:
        if not self._is_mine and not self.is_attached:
            self._n_outside, self._sees_outside = self._n_outside + 1, True

    @property
    def is_ahead(self) -> bool:
        """Did somebody's loop step the last optimizer, and was that not asked for by `took_outside` yet?"""
        return self._n_outside > 0

    def took_outside(self) -> bool | None:
        """Did somebody's loop step the last optimizer since this was asked before?

        Returns:
            None where that cannot be known, as no step of the loop has ever been seen: not every library
            calls the hooks of torch's optimizers.
        """
        n, self._n_outside = self._n_outside, 0
        return n > 0 if self._sees_outside else None

    def step(self, closure: Callable[[], float] | None) -> float | None:
        """Step them all. Warns where somebody's loop did already.

        Raises:
            UsageError: a closure was given, and there are several optimizers.
        """
        self._n_doubled = self._n_doubled + 1 if self.took_outside() else 0
        if self._n_doubled == 2:  # once may be the last step of a part of the loop that has none of these
            warnings.warn(
                "The optimizer made a step before trainer.step() made another: each gradient is applied "
                "twice. Leave the first out: trainer.step() stands in its place. With a GradScaler call "
                "trainer.attach() once, and scaler.step(optimizer) alone; or trainer.after_step() behind it.",
                stacklevel=3,
            )
        if closure is not None and len(self.given) > 1:
            raise UsageError(
                f"A closure was given, and there are {len(self.given)} optimizers.",
                do="Compute the gradients first, and call step() without a closure.",
            )
        loss: float | None = None
        self._is_mine = True
        try:
            for optimizer in self.given:
                loss = optimizer.step(closure) if closure else optimizer.step()
        finally:
            self._is_mine = False
        return loss


def _is_captured() -> bool:
    """Does a CUDA graph record what is done now?"""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _unwrapped(given: Any) -> Optimizer:
    """The optimizer of torch inside one of accelerate or lightning. Raises UsageError for what is none."""
    inner = given
    while isinstance(getattr(inner, "optimizer", None), Optimizer):
        inner = inner.optimizer
    if not isinstance(inner, Optimizer):
        raise UsageError(
            f"{type(given).__name__} is no optimizer.",
            expected="One of torch.optim.Optimizer was expected, or a sequence of them.",
        )
    return inner
