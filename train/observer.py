"""Observers: they are called while training goes on."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from sparse_export.formats.run import RunInfo
from sparse_export.train.metrics import EpochMetrics


class Observer(Protocol):
    """Called at the start of a training, after every step and after every epoch."""

    def started(self, info: RunInfo, total_steps: int, step: int) -> None: ...

    def stepped(self, step: int, loss: Tensor) -> None: ...

    def finished_epoch(self, metrics: EpochMetrics) -> None: ...


class SilentObserver:
    """Does nothing."""

    def started(self, info: RunInfo, total_steps: int, step: int) -> None:
        pass

    def stepped(self, step: int, loss: Tensor) -> None:
        pass

    def finished_epoch(self, metrics: EpochMetrics) -> None:
        pass
