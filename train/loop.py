"""Trains one network by one recipe, and can go on where it was stopped."""

from __future__ import annotations

import math
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from sparse_export import artefact, data, models
from sparse_export import trust as trust_store
from sparse_export.artefact import Accuracy, DataFact, LayerFact, ModelFact, Run, RunInfo
from sparse_export.errors import (
    ArtefactError,
    Interrupted,
    MissingCapability,
    RecipeError,
    TrainingDiverged,
    UsageError,
)
from sparse_export.files import sha256_file
from sparse_export.train.augment import PADDING, crop_flip
from sparse_export.train.checkpoint import Position, load_state, save_state, state_path
from sparse_export.train.layers import maskable_parameters
from sparse_export.train.metrics import EpochMetrics, MetricsLog
from sparse_export.train.rates import learning_rate
from sparse_export.train.recipe import Recipe, load_recipe, recipe_from_table
from sparse_export.train.run_folder import finish_run, require_empty, write_run_info
from sparse_export.train.sparse_training import SparseTraining, layer_facts

_FLOAT_LIMIT_BYTES = 2 * 1024**3  # inputs are kept normalised in memory up to here, else normalised per batch
_SAVE_EVERY_S = 120.0  # within a long epoch
_ORDER, _AUGMENTATION = 0, 1 << 60  # apart, so that no two uses of a seed draw the same numbers
_CHECK_EVERY = 50  # steps between looks at an accelerator's loss
_SINGLE_THREAD_WORK = 50e6  # weights x batch size; see _n_threads


class Observer(Protocol):
    """Is told how training goes. The default says nothing."""

    def started(self, info: RunInfo, total_steps: int, step: int) -> None: ...

    def stepped(self, step: int, loss: Tensor) -> None: ...

    def finished_epoch(self, metrics: EpochMetrics) -> None: ...


class SilentObserver:
    """Says nothing."""

    def started(self, info: RunInfo, total_steps: int, step: int) -> None:
        pass

    def stepped(self, step: int, loss: Tensor) -> None:
        pass

    def finished_epoch(self, metrics: EpochMetrics) -> None:
        pass


def train(
    recipe: Recipe | str | Path | None,
    out: str | Path,
    *,
    data_dir: Path | None = None,
    download: bool = False,
    device: str = "auto",
    resume: bool = False,
    trust: str | None = None,
    observer: Observer | None = None,
) -> Run:
    """Train by a recipe (an object, a shipped name or a TOML path) into the run folder `out`.

    resume: go on with the unfinished run in `out` instead, by the recipe that it was started with; a finished
    one is returned as it is. On the CPU a resumed run ends with the bits of an unbroken one.
    trust: SHA-256 of a `run.json` whose factory may be imported though this user did not write it.
    The last tenth of the training set (`validation_fraction`) is for choices; the test set is read once, at the end.
    Raises UsageError, DataNotFound, OutputError, TrainingDiverged (the last good state is kept), Interrupted on
    SIGINT or SIGTERM (after saving), NotTrustedError.
    """
    out = Path(out)
    if resume:
        info = artefact.read_run_info(out)
        if info.status == "complete":
            return artefact.open_run(out)
        recipe = _recorded_recipe(info, out)
        if models.is_factory(recipe.model):
            digest = sha256_file(out / artefact.RUN_FILE)
            trust_store.require(digest, f"the factory {recipe.model} in {out}", given=trust)
    elif recipe is None:
        raise UsageError("No recipe was given.", expected="A recipe, or --resume with a run, was expected.")
    elif not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    session = _Session(recipe, out, data_dir, download, device, resume)
    with _stop_signals() as stop, _cpu_settings(session.n_threads):
        return session.train(observer or SilentObserver(), stop)


def _recorded_recipe(info: RunInfo, out: Path) -> Recipe:
    """The recipe in a `run.json`. Raises ArtefactError when it is no recipe, or another network's."""
    file = out / artefact.RUN_FILE
    try:
        recipe = recipe_from_table(info.recipe, source=str(file))
    except RecipeError as cause:
        raise ArtefactError(
            f"{file} is damaged: {cause}", do="Start the run again in another folder."
        ) from cause
    if recipe.model != info.model.name:
        raise ArtefactError(
            f"{file} contradicts itself: its model is {info.model.name!r}, its recipe's {recipe.model!r}.",
            expected="One network was expected.",
            do="Do not use this folder.",
        )
    return recipe


@contextmanager
def _cpu_settings(n_threads: int) -> Iterator[None]:
    """Train with so many threads and without denormals; then with the process's threads, and denormals, again.

    The momentum of a dead unit decays into denormals and stays there, which slows a CPU down many times.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)


class _Stop:
    """Whether somebody asked training to stop."""

    requested = False


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Turn the first SIGINT or SIGTERM into a request; a second one acts as it did before."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(kw_only=True)
class _Split:
    """Inputs and labels on the training device."""

    x: Tensor
    y: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def load(cls, x: Tensor, y: Tensor, fact: DataFact, device: torch.device) -> _Split:
        split = cls(x=x, y=y.to(device), mean=fact.mean, std=fact.std)
        if 4 * x.numel() <= _FLOAT_LIMIT_BYTES:
            split.x = data.normalise(x.to(device), fact.mean, fact.std)
            split.mean = split.std = ()
        return split

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The samples of these rows; int64, on the inputs' device. index_select is 3 times as fast as x[rows]."""
        x, y = self.x.index_select(0, rows), self.y.index_select(0, rows.to(self.y.device))
        return self._ready(x), y

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All samples in order."""
        for start in range(0, len(self), size):
            yield self._ready(self.x[start : start + size]), self.y[start : start + size]

    def _ready(self, x: Tensor) -> Tensor:
        return data.normalise(x.to(self.y.device), self.mean, self.std) if self.mean else x

    def __len__(self) -> int:
        return self.y.numel()


class _Session:
    """Owns everything that one training run moves forward."""

    def __init__(
        self, recipe: Recipe, out: Path, data_dir: Path | None, download: bool, device: str, resume: bool
    ) -> None:
        """Check all that can be checked before anything is written."""
        self.recipe = recipe
        self.out = out
        self.data_dir = data_dir
        earlier = artefact.read_run_info(out) if resume else None
        self.device = _device(earlier.device if earlier and _resumes_on(earlier.device, device) else device)
        if not resume:
            require_empty(out)
        dataset = data.load(recipe.data, data_dir, image_size=_image_size(recipe), download=download)
        train_part, validation_part = data.split(dataset, recipe.validation_fraction)
        fact = DataFact(
            name=dataset.name,
            mean=dataset.mean,
            std=dataset.std,
            n_train=train_part[1].numel(),
            n_validation=validation_part[1].numel(),
            n_test=dataset.y_test.numel(),
            test_sha256=data.test_sha256(dataset),
        )
        if earlier is not None and earlier.data != fact:
            raise ArtefactError(
                f"The data are others than the run in {out} was started with: {fact}.",
                expected=f"{earlier.data} was expected.",
                do="Give the folder with the original data by --data-dir.",
            )
        shape = dataset.input_shape
        if recipe.augment == "crop-flip" and (len(shape) != 3 or min(shape[1:]) <= PADDING):
            raise UsageError(
                f"augment = 'crop-flip' cannot be done to inputs of shape {shape} from {recipe.data}.",
                expected=f"Images (C, H, W) higher and wider than {PADDING} were expected.",
                do="Leave augment out of the recipe.",
            )
        self.train_split, self.validation_split, self.test_split = (
            _Split.load(x, y, fact, self.device)
            for x, y in (train_part, validation_part, (dataset.x_test, dataset.y_test))
        )
        torch.manual_seed(recipe.seed)
        self.model = models.create(recipe.model, dataset.n_classes).to(self.device)
        self.n_outputs = self._require_fit(dataset.input_shape, dataset.n_classes)
        self.batch_size = min(recipe.batch_size, len(self.train_split))
        self.steps_per_epoch = len(self.train_split) // self.batch_size
        self.total_steps = self.steps_per_epoch * recipe.epochs
        self.optimizer = _optimizer(recipe, self.model)
        self.sparse = None if recipe.dense else self._sparse_training()
        self.position = Position()
        self.n_threads = recipe.threads or _n_threads(self.model, self.batch_size)
        self.info = self._info(fact)
        if earlier is not None:
            self.n_threads = earlier.n_threads
            self.info = replace(
                self.info, n_threads=earlier.n_threads, created=earlier.created, command=earlier.command
            )
            if state_path(out).is_file():
                self.position = load_state(out, self.model, self.optimizer, self.sparse)

    def _require_fit(self, input_shape: tuple[int, ...], n_classes: int) -> int:
        """The number of the network's outputs. Raises UsageError when it cannot take this data."""
        self.model.eval()
        try:
            with torch.no_grad():
                output = self.model(torch.zeros((2, *input_shape), device=self.device))
        except (
            Exception
        ) as cause:  # whatever a network raises: some assert, some index, most multiply matrices
            reason = next(iter(str(cause).splitlines()), type(cause).__name__)
            raise UsageError(
                f"The model {self.recipe.model} cannot take inputs of shape {input_shape} from {self.recipe.data}: "
                f"{reason}.",
                expected="A model and a data set of one shape were expected.",
                do="Choose another model or data set.",
            ) from cause
        if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[-1] < n_classes:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UsageError(
                f"The model {self.recipe.model} answers two inputs with {got}.",
                expected=f"Logits of shape (2, {n_classes}) were expected for {self.recipe.data}.",
                do="Choose a model with as many outputs as there are classes.",
            )
        return output.shape[-1]

    def _sparse_training(self) -> SparseTraining:
        settings = self.recipe.sparsity
        return SparseTraining(
            self.model,
            self.optimizer,
            density=settings.density,
            total_steps=self.total_steps,
            update_every=settings.update_every or None,
            prune_rate=settings.prune_rate,
            final_prune_rate=settings.final_prune_rate,
            prune_schedule=settings.prune_schedule,
            redistribution=settings.redistribution,
            start=settings.start,
            rescale=settings.rescale,
            keep_dense=settings.keep_dense,
            seed=self.recipe.seed,
        )

    def _info(self, fact: DataFact) -> RunInfo:
        sparse = self.sparse
        weights = maskable_parameters(self.model)
        n_masked = sparse.n_masked if sparse else sum(value.numel() for value in weights.values())
        return RunInfo(
            status="running",
            method="sparse-momentum" if sparse else "dense",
            model=ModelFact(
                name=self.recipe.model,
                input_shape=tuple(self.train_split.x.shape[1:]),
                n_classes=self.n_outputs,
            ),
            data=fact,
            target_density=sparse.density if sparse else 1.0,
            density=sparse.n_active / n_masked if sparse else 1.0,
            n_active=sparse.n_active if sparse else n_masked,
            n_masked=n_masked,
            n_parameters=sum(value.numel() for value in self.model.parameters()),
            layers=self._layer_facts(),
            validation=None,
            test=None,
            seed=self.recipe.seed,
            n_threads=self.n_threads,
            device=str(self.device),
            epochs=self.recipe.epochs,
            n_steps=self.total_steps,
            seconds=0.0,
            recipe=self.recipe.model_dump(mode="json"),
            versions=artefact.library_versions(),
            command=artefact.command_line(),
            created=artefact.now(),
            files={},
        )

    def _layer_facts(self) -> tuple[LayerFact, ...]:
        return layer_facts(self.model, self.sparse.masks if self.sparse else {})

    def train(self, observer: Observer, stop: _Stop) -> Run:
        write_run_info(self.out, self.info)
        observer.started(self.info, self.total_steps, self.position.step)
        with MetricsLog(self.out, self.position.metrics_bytes, self.position.epoch) as log:
            while self.position.epoch < self.recipe.epochs:
                self._train_epoch(observer, stop, log)
        validation = self._accuracy(self.validation_split) if len(self.validation_split) else None
        info = replace(
            self.info,
            validation=validation,
            test=self._accuracy(self.test_split),
            layers=self._layer_facts(),
            seconds=self.position.seconds,
        )
        return finish_run(self.out, self.model, self.sparse.masks if self.sparse else {}, info)

    def _train_epoch(self, observer: Observer, stop: _Stop, log: MetricsLog) -> None:
        epoch, at = self.position.epoch, self.position
        # The order of an epoch follows from the seed and the epoch alone, so it can be made again on resume.
        order = torch.randperm(len(self.train_split), generator=self._generator(_ORDER, epoch))
        order = order.to(self.train_split.x.device)
        started = saved = time.monotonic()
        # The CPU's loss is read at every step; an accelerator's is summed there, so that the host need not wait.
        on_cpu = self.device.type == "cpu"
        total: float | Tensor = at.loss_sum
        if not on_cpu:
            total = torch.tensor(at.loss_sum, dtype=torch.float64, device=self.device)
        step = at.step
        self.model.train()

        def position(*, epoch: int = epoch, step_in_epoch: int = 0, loss_sum: float = 0.0) -> Position:
            return Position(
                step=step,
                epoch=epoch,
                step_in_epoch=step_in_epoch,
                loss_sum=loss_sum,
                seconds=at.seconds + time.monotonic() - started,
                metrics_bytes=log.size_bytes,
            )

        for place in range(at.step_in_epoch, self.steps_per_epoch):
            rate = learning_rate(step, self.total_steps, self.recipe.optimizer.lr, self.recipe.learning_rate)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            x, y = self.train_split.batch(order[place * self.batch_size : (place + 1) * self.batch_size])
            if self.recipe.augment == "crop-flip":
                x = crop_flip(x, self._generator(_AUGMENTATION, step))
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(x), y, label_smoothing=self.recipe.label_smoothing)
            loss.backward()
            total = total + (loss.item() if on_cpu else loss.detach())
            if on_cpu or step % _CHECK_EVERY == 0:
                self._require_finite(total, step)
            self._step_weights(step)
            step += 1
            observer.stepped(step, loss)
            if stop.requested or time.monotonic() - saved > _SAVE_EVERY_S:
                self._require_finite(total, step - 1)
                here = position(step_in_epoch=place + 1, loss_sum=float(total))
                self._save(here)
                saved = time.monotonic()
                if stop.requested:
                    where = f" --data-dir {shlex.quote(str(self.data_dir))}" if self.data_dir else ""
                    raise Interrupted(
                        f"Stopped after step {step} of {self.total_steps}; nothing is lost.",
                        do=f"Go on with: sparse-export train --resume --out {shlex.quote(str(self.out))}{where}",
                    )
        self._require_finite(total, step - 1)
        validation = self._accuracy(self.validation_split).percent if len(self.validation_split) else None
        rate_used, flip_rate = self._end_of_epoch_update(epoch)
        metrics = EpochMetrics(
            epoch=epoch + 1,
            step=step,
            train_loss=float(total) / self.steps_per_epoch,
            validation_percent=validation,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            density=self.info.density,
            layer_density={fact.name: fact.density for fact in self._layer_facts() if fact.masked},
            prune_rate=rate_used,
            flip_rate=flip_rate,
            seconds=at.seconds + time.monotonic() - started,
        )
        self._require_finite_weights(step)
        log.write(metrics)
        self.position = position(epoch=epoch + 1)
        self._save(self.position)
        observer.finished_epoch(metrics)

    def _generator(self, purpose: int, place: int) -> torch.Generator:
        """Randomness that follows from the seed and a place in the run alone: nothing to save, nothing to restore."""
        return torch.Generator().manual_seed(purpose + self.recipe.seed * 1_000_003 + place)

    def _save(self, position: Position) -> None:
        """Write the state, which is what a later failure falls back on, so only while it is finite."""
        self._require_finite_weights(position.step)
        save_state(self.out, position, self.model, self.optimizer, self.sparse)

    def _require_finite_weights(self, step: int) -> None:
        values = [value for value in self.model.state_dict().values() if value.is_floating_point()]
        if not bool(torch.stack([value.isfinite().all() for value in values]).all()):
            raise self._diverged(step - 1, "The weights are no longer numbers.")

    def _step_weights(self, step: int) -> None:
        if self.sparse is None:
            self.optimizer.step()
            return
        try:
            self.sparse.step()
        except UsageError:
            raise
        except ValueError as cause:  # a mask update met weights or momenta that are no numbers
            raise self._diverged(step, f"The weights are no longer numbers: {cause}") from cause

    def _end_of_epoch_update(self, epoch: int) -> tuple[float | None, float | None]:
        """Update the masks where the recipe says once an epoch, but not after the last. (prune rate, flip rate)."""
        sparse = self.sparse
        if sparse is None or sparse.update_every is not None or epoch + 1 == self.recipe.epochs:
            return None, None
        before = {name: mask.clone() for name, mask in sparse.masks.items()}
        rate = sparse.prune_rate
        try:
            sparse.update()
        except UsageError:
            raise
        except ValueError as cause:
            raise self._diverged(sparse.n_steps - 1, f"The weights are no longer numbers: {cause}") from cause
        n_flipped = sum(int((sparse.masks[name] ^ mask).sum()) for name, mask in before.items())
        return rate, n_flipped / sparse.n_masked

    def _require_finite(self, loss_sum: float | Tensor, step: int) -> None:
        if not math.isfinite(loss_sum):
            raise self._diverged(step, "The loss is no longer a number.")

    def _diverged(self, step: int, what: str) -> TrainingDiverged:
        kept = state_path(self.out)
        return TrainingDiverged(
            f"Step {step + 1} of {self.total_steps}: {what}",
            expected="Training was expected to stay finite.",
            do="Lower optimizer.lr in the recipe."
            + (f" The last good state is kept in {kept}." if kept.is_file() else ""),
        )

    @torch.no_grad()
    def _accuracy(self, split: _Split) -> Accuracy:
        self.model.eval()
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for x, y in split.batches(1000):
            correct += (self.model(x).argmax(1) == y).sum()
        return Accuracy(n_correct=int(correct), n_samples=len(split))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise MissingCapability(
            "This machine has no CUDA device that torch can use.",
            expected="One was expected for --device cuda.",
            do="Use --device cpu, or see what `sparse-export doctor` finds.",
        )
    return torch.device(name)


def _resumes_on(earlier: str, asked: str) -> bool:
    """Does a resumed run stay on the device that it was started on? `auto` does where that device is there."""
    return asked == "auto" and (earlier == "cpu" or torch.cuda.is_available())


def _image_size(recipe: Recipe) -> tuple[int, int] | None:
    """Height and width that pictures of any size are cut to: what the network takes, where that is known."""
    shape = models.input_shape(recipe.model) if recipe.data.startswith("imagefolder:") else None
    return None if shape is None else (shape[1], shape[2])


def _n_threads(model: nn.Module, batch_size: int) -> int:
    """One thread for a network whose step is too short to share, else torch's own choice.

    A function of the network, not of a timing, so that a recipe gives the same bits on every run.
    """
    n_weights = sum(value.numel() for value in model.parameters())
    return 1 if n_weights * batch_size <= _SINGLE_THREAD_WORK else torch.get_num_threads()


def _optimizer(recipe: Recipe, model: nn.Module) -> Optimizer:
    settings = recipe.optimizer
    parameters = [value for value in model.parameters() if value.requires_grad]
    if settings.name == "sgd":
        return SGD(
            parameters,
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=settings.nesterov and settings.momentum > 0,
            weight_decay=settings.weight_decay,
            fused=True,
        )
    kind = Adam if settings.name == "adam" else AdamW
    return kind(
        parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )
