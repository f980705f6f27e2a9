"""Shows how training, pruning, engine builds and timings go, on stderr: a bar on a terminal, else lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sparse_export.cli._common import say
from sparse_export.tables import visible

if TYPE_CHECKING:
    from rich.progress import TaskID
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
    """A bar with loss, accuracy, density, steps/s and time left."""

    def __init__(self, label: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f} %  {task.fields[state]}  {task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._label = label or "train"
        self._validated = ""
        self._shown = 0.0

    def started(self, info: RunInfo, total_steps: int, step: int) -> None:
        self._console.print(_headline(info, total_steps, step), highlight=False)
        self._total = total_steps
        self._epochs = info.epochs
        self._density = info.density
        self._first = (step, time.monotonic())
        self._task = self._progress.add_task(
            self._label, total=total_steps, completed=step, state="", rate=""
        )
        self._progress.start()

    def stepped(self, step: int, loss: Tensor) -> None:
        now = time.monotonic()
        if now - self._shown < _EVERY_S and step != self._total:
            return
        self._shown = now
        first, then = self._first
        rate = (step - first) / max(now - then, 1e-9)
        state = f"loss {float(loss.detach()):.3f}{self._validated} density {self._density:.3f}"
        self._progress.update(self._task, completed=step, state=state, rate=f"{rate:.3g} steps/s")

    def finished_epoch(self, metrics: EpochMetrics) -> None:
        if metrics.validation_score is not None:
            self._validated = f" validation {metrics.validation}"
        if metrics.epoch == self._epochs:
            self.close()
            self._console.print(_epoch_text(metrics, self._epochs), highlight=False)

    def close(self) -> None:
        self._progress.stop()


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
    """A bar over the work of all layers, with the last layer and the time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._escape = escape
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[layer]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task("prune", total=1.0, left="", layer="")
        self._from: tuple[float, float] | None = None

    def __call__(self, done: LayerDone) -> None:
        now = time.monotonic()
        if self._from is None or done.resumed:
            self._from = done.share, now
        first, then = self._from
        gained = done.share - first
        left = "" if gained <= 0 else f"{_duration((now - then) * (1 - done.share) / gained)} left"
        layer = f"{done.number} of {done.n_layers}: {visible(done.layer.name)}"
        self._progress.update(self._task, completed=done.share, left=left, layer=self._escape(layer))
        self._progress.start()
        if done.number == done.n_layers:
            self.close()

    def close(self) -> None:
        self._progress.stop()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


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
    """A bar for each engine, with the phase that it is in."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[phase]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, target: str, state: BuildProgress) -> None:
        if target not in self._tasks:
            self._tasks[target] = self._progress.add_task(target, total=1.0, phase="")
            self._progress.start()
        self._progress.update(self._tasks[target], completed=state.fraction, phase=state.phase)

    def close(self) -> None:
        self._progress.stop()


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
    """A line that is written over: rounds, and the time left at most."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.status import Status

        self._status = Status("", console=Console(stderr=True))

    def __call__(self, n: int, most: int, left_s: float) -> None:
        self._status.update(f"round {n} of at most {most}, at most {left_s:.0f} s left")
        self._status.start()
        if left_s == 0.0:
            self._status.stop()

    def close(self) -> None:
        self._status.stop()
