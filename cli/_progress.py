"""Shows how training, pruning, engine builds and timings go, on stderr: a bar on a terminal, else lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sparse_export.cli._bar import Bar
from sparse_export.cli._common import say

if TYPE_CHECKING:
    from torch import Tensor

    from sparse_export.engines.progress import BuildProgress
    from sparse_export.formats.run import RunInfo
    from sparse_export.oneshot.costs import LayerDone
    from sparse_export.train.metrics import EpochMetrics

_LINE_EVERY_S = 30.0
_EVERY_S = 0.2  # reading the loss makes the host wait for a device


@contextmanager
def training_observer(label: str = "") -> Iterator[_Bar | _Lines]:
    """The observer that suits where stderr goes. label: put in front of every line."""
    observer = _Bar(label) if sys.stderr.isatty() else _Lines(label)
    try:
        yield observer
    finally:
        observer.close()


def _headline(info: RunInfo, total_steps: int, step: int) -> str:
    what = "dense" if info.method == "dense" else f"{info.n_active:,} of {info.n_masked:,} weights"
    origin = f", from step {step:,}" if step else ""
    data = info.data.name if info.data else "unknown data"
    return (
        f"{info.model.name} on {data}, {what}, {info.epochs} epoch{_s(info.epochs)}, {total_steps:,} "
        f"step{_s(total_steps)}{origin}, "
        f"{info.device}, {info.n_threads} thread{_s(info.n_threads)}, seed {info.seed}"
    )


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def _epoch_text(metrics: EpochMetrics, epochs: int) -> str:
    parts = [f"epoch {metrics.epoch}/{epochs}", f"loss {metrics.train_loss:.4f}"]
    if metrics.validation_score is not None:
        parts.append(f"validation {metrics.validation}")
    parts.append(f"density {metrics.density:.4f}")
    return "  ".join(parts)


class _Lines:
    """One line an epoch."""

    def __init__(self, label: str) -> None:
        self._label = f"{label}: " if label else ""
        self._epochs = 0
        self._total = 0
        self._last = (0, 0.0)

    def close(self) -> None:
        pass

    def _say(self, text: str) -> None:
        print(f"{self._label}{text}", file=sys.stderr, flush=True)

    def started(self, info: RunInfo, total_steps: int, step: int) -> None:
        self._epochs = info.epochs
        self._total = total_steps
        self._last = (step, time.monotonic())
        self._say(_headline(info, total_steps, step))

    def stepped(self, step: int, loss: Tensor) -> None:
        pass

    def finished_epoch(self, metrics: EpochMetrics) -> None:
        step, then = self._last
        now = time.monotonic()
        self._last = (metrics.step, now)
        rate = (metrics.step - step) / max(now - then, 1e-9)
        left = (self._total - metrics.step) / max(rate, 1e-9)
        self._say(f"{_epoch_text(metrics, self._epochs)}  {rate:.3g} steps/s  {left:.0f} s left")


class _Bar:
    """A bar with time left, loss, score, steps/s and density."""

    def __init__(self, label: str) -> None:
        self._bar = Bar(label or "train")
        self._validated = ""
        self._shown = 0.0

    def started(self, info: RunInfo, total_steps: int, step: int) -> None:
        self._print(_headline(info, total_steps, step))
        self._total = total_steps
        self._epochs = info.epochs
        self._density = info.density
        self._first = (step, time.monotonic())
        self._bar.show(step / max(total_steps, 1))

    def stepped(self, step: int, loss: Tensor) -> None:
        now = time.monotonic()
        if now - self._shown < _EVERY_S and step != self._total:
            return
        self._shown = now
        first, then = self._first
        rate = (step - first) / max(now - then, 1e-9)
        pieces = (
            f"loss {float(loss.detach()):.3f}",
            self._validated,
            f"{rate:.3g} steps/s",
            f"density {self._density:.3f}",
        )
        self._bar.show(step / self._total, left_s=(self._total - step) / max(rate, 1e-9), pieces=pieces)

    def finished_epoch(self, metrics: EpochMetrics) -> None:
        if metrics.validation_score is not None:
            self._validated = f"validation {metrics.validation}"
        if metrics.epoch == self._epochs:
            self.close()
            self._print(_epoch_text(metrics, self._epochs))

    def _print(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self._bar.close()


@contextmanager
def layer_observer() -> Iterator[_LayerBar | _LayerLines]:
    """What is told of each layer that is pruned."""
    observer = _LayerBar() if sys.stderr.isatty() else _LayerLines()
    try:
        yield observer
    finally:
        observer.close()


class _LayerLines:
    """One line a layer."""

    def __call__(self, done: LayerDone) -> None:
        say(f"{done.number} of {done.n_layers}: {done.layer.name}")

    def close(self) -> None:
        pass


class _LayerBar:
    """A bar over the work of all layers, with the time left and the last layer."""

    def __init__(self) -> None:
        self._bar = Bar("prune")
        self._from: tuple[float, float] | None = None

    def __call__(self, done: LayerDone) -> None:
        now = time.monotonic()
        if self._from is None or done.resumed:
            self._from = done.share, now
        first, then = self._from
        gained = done.share - first
        left_s = None if gained <= 0 else (now - then) * (1 - done.share) / gained
        pieces = (f"{done.number} of {done.n_layers}: {done.layer.name}",)
        self._bar.show(done.share, left_s=left_s, pieces=pieces)
        if done.number == done.n_layers:
            self.close()

    def close(self) -> None:
        self._bar.close()


@contextmanager
def engine_observer() -> Iterator[_EngineBar | _EngineLines]:
    """What is told how engines get on, by target."""
    observer = _EngineBar() if sys.stderr.isatty() else _EngineLines()
    try:
        yield observer
    finally:
        observer.close()


class _EngineLines:
    """One line an engine."""

    def __init__(self) -> None:
        self._target = ""

    def __call__(self, target: str, state: BuildProgress) -> None:
        if target != self._target:
            self._target = target
            print(f"building the {target} engine", file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


class _EngineBar:
    """A bar with the phase that the engine's build is in. How long that takes nobody can say beforehand."""

    def __init__(self) -> None:
        self._bar = Bar("")

    def __call__(self, target: str, state: BuildProgress) -> None:
        self._bar.show(state.fraction, pieces=(state.phase,), label=target)

    def close(self) -> None:
        self._bar.close()


@contextmanager
def round_observer() -> Iterator[_RoundBar | _RoundLines]:
    """What is told of each round of a measurement of times."""
    observer = _RoundBar() if sys.stderr.isatty() else _RoundLines()
    try:
        yield observer
    finally:
        observer.close()


class _RoundLines:
    """One line in half a minute."""

    def __init__(self) -> None:
        self._shown = time.monotonic()

    def __call__(self, n: int, most: int, left_s: float) -> None:
        now = time.monotonic()
        if now - self._shown >= _LINE_EVERY_S:
            self._shown = now
            text = f"round {n} of at most {most}, at most {left_s:.0f} s left"
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


class _RoundBar:
    """A bar over the rounds of a measurement, with the time left at most."""

    def __init__(self) -> None:
        self._bar = Bar("time")

    def __call__(self, n: int, most: int, left_s: float) -> None:
        self._bar.show(n / most, left_s=left_s, pieces=(f"round {n} of at most {most}",))
        if left_s == 0.0:
            self._bar.close()

    def close(self) -> None:
        self._bar.close()
