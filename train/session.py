"""One training run under way: everything that it moves forward, step by step."""

from __future__ import annotations

import hashlib
import math
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_export import artefact, models
from sparse_export.artefact import Accuracy, LayerFact, ModelFact, Run, RunInfo, SpeedFact
from sparse_export.errors import ArtefactError, Interrupted, MissingCapability, TrainingDiverged, UsageError
from sparse_export.sparsity.product24 import require_backend
from sparse_export.train import step24
from sparse_export.train.augment import crop_flip, draw_crops
from sparse_export.train.captured import CapturedStep, make_capturable, set_rate
from sparse_export.train.checkpoint import Position, load_state, remove_leftovers, save_state, state_path
from sparse_export.train.csr_choice import choose_products
from sparse_export.train.distributed import Agreement, World, masks_sha256
from sparse_export.train.ema import Ema
from sparse_export.train.feed import Feed, Part, feed
from sparse_export.train.layers import layer_facts, maskable_parameters, output_layers
from sparse_export.train.making import ASP_CUT, make_sparsifier
from sparse_export.train.metrics import EpochMetrics, MetricsLog, read_metrics
from sparse_export.train.observer import Observer, SilentObserver
from sparse_export.train.optimizer import make_optimizer
from sparse_export.train.rates import learning_rate
from sparse_export.train.recipe import Recipe
from sparse_export.train.run_folder import finish_run, require_empty, write_run_info
from sparse_export.train.snip import snip_masks
from sparse_export.train.sparse_training import SparseTraining
from sparse_export.train.sparsifier import Sparsifier
from sparse_export.train.speed import LayerUse, layer_uses, speed_of
from sparse_export.train.starting_point import STARTED, StartingPoint
from sparse_export.train.step24 import Step24, product_facts, products_24
from sparse_export.train.step_csr import StepCsr
from sparse_export.train.stopping import Stop, cpu_settings

_SAVE_EVERY_S = 120.0  # within a long epoch
_ORDER, _AUGMENTATION = 0, 1 << 60  # apart, so that no two uses of a seed draw the same numbers
_CHECK_EVERY = 50  # steps between looks at an accelerator's loss
_SINGLE_THREAD_WORK = 50e6  # weights x batch size; see n_threads_for
_USE_BATCH = 128  # most samples of the batch that shows what layers have to do
_TEST_BATCH, _TEST_VALUES = 1000, 16 * 2**20  # samples, and input values, of a batch of an evaluation


class Session:
    """Owns everything that one training run moves forward."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        data_dir: Path | None,
        download: bool,
        device: torch.device,
        world: World,
        earlier: RunInfo | None,
        start: StartingPoint | None = None,
    ) -> None:
        """Check all that can be checked before anything is written. start: in place of fresh weights and masks."""
        self.recipe, self.out, self.data_dir = recipe, out, data_dir
        self.device, self.world = device, world
        _require_possible(recipe, device, world)
        if earlier is None:
            require_empty(out)
        world.wait()  # nobody writes before everybody has looked
        self.feed: Feed = feed(recipe, data_dir, download, device, world)
        if earlier is not None and earlier.data != self.feed.fact:
            raise ArtefactError(
                f"The data are others than the run in {out} was started with: {self.feed.fact}.",
                expected=f"{earlier.data} was expected.",
                do="Give the folder with the original data by --data-dir.",
            )
        torch.manual_seed(recipe.seed)
        n_outputs = earlier.model.n_classes if earlier else start.n_outputs if start else self.feed.n_classes
        self.model = models.create(recipe.model, n_outputs)
        if recipe.sync_batch_norm and world.size > 1:
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.model = self.model.to(device)
        if recipe.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.n_outputs = self._require_fit(self.feed.input_shape, self.feed.n_classes)
        self.batch_size = self._whole_batch()
        self.steps_per_epoch = self.feed.fact.n_train // self.batch_size
        self.total_steps = self.steps_per_epoch * recipe.epochs
        self.optimizer = make_optimizer(recipe.optimizer, self.model)
        self.sparse = None if recipe.dense else self._sparsifier()
        self._method = earlier.method if earlier else start.method if start else None
        self._promises = _promises(earlier, start)
        if start is not None:
            self._begin_at(start)
        self.ema = Ema(self.model, recipe.ema) if recipe.ema else None
        self._n_updates_averaged = 0
        self.forward = self._forward()
        self.position = Position()
        self.n_threads = recipe.threads or n_threads_for(self.model, self.batch_size)
        self.info = self._info()
        if earlier is not None:
            if earlier.n_processes == world.size:
                self.n_threads = earlier.n_threads
            self.info = replace(
                self.info, n_threads=self.n_threads, created=earlier.created, command=earlier.command
            )
            if world.is_first:
                remove_leftovers(out)
            world.wait()
            if state_path(out).is_file():
                self.position = load_state(out, self.model, self.optimizer, self.sparse, self.ema)
            elif earlier.method.startswith(STARTED):
                raise ArtefactError(
                    f"{state_path(out)} is missing, and the run in {out} did not begin at fresh weights.",
                    expected="The weights that it began at were expected there.",
                    do="Start the run again in another folder.",
                )
        elif start is not None:
            self._save(self.position)  # a run that is killed early is not resumed from fresh weights
        self.products = self._csr_products(earlier) or self._products_24()
        make_capturable(self.optimizer, device if recipe.cuda_graph else None)
        self._captured = CapturedStep(self._whole_step) if recipe.cuda_graph else None

    def _products_24(self) -> Step24 | None:
        """2:4 products, tuned for a batch of the recipe's size."""
        if not isinstance(self.sparse, SparseTraining) or self.recipe.sparsity.products != "2:4":
            return None
        n_own = max(1, self.batch_size // self.world.size)  # of a batch, this process's share
        sample = self._laid_out(torch.zeros((n_own, *self.feed.input_shape), device=self.device))
        products = products_24(
            self.model, self.sparse, sample, sparse_backward=self.recipe.sparsity.transposable
        )
        self.info = replace(self.info, products=product_facts(products, self.sparse.masks))
        return products

    def _csr_products(self, earlier: RunInfo | None) -> StepCsr | None:
        """CSR products of the layers that win by them, as the run's record has them where it is resumed."""
        settings = self.recipe.sparsity
        if not isinstance(self.sparse, SparseTraining) or settings.products != "csr":
            return None
        facts = earlier.products if earlier is not None else ()
        if not facts:
            sample = self._laid_out(torch.zeros((self.batch_size, *self.feed.input_shape)))
            with cpu_settings(self.n_threads):
                facts = choose_products(self.model, self.sparse.masks, sample)
        self.info = replace(self.info, products=facts)
        layers = [fact.name for fact in facts if fact.by == "csr"]
        if not layers:
            return None
        return StepCsr(
            self.model,
            self.sparse,
            layers=layers,
            window=settings.window,
            update_every=self.steps_per_epoch,
        )

    def _begin_at(self, start: StartingPoint) -> None:
        self.model.load_state_dict(dict(start.weights))
        if self.sparse is not None:
            self.sparse.load_state_dict(self.sparse.state_dict() | {"masks": dict(start.masks)})

    def _whole_batch(self) -> int:
        """Samples of a step over all processes. Raises UsageError when a process would get none."""
        size = min(self.recipe.batch_size, self.feed.fact.n_train)
        if size < self.world.size:
            raise UsageError(
                f"A batch of {size} samples is to be shared by {self.world.size} processes.",
                expected="At least one sample for each was expected.",
                do="Start fewer processes, or raise batch_size, which is that of all of them together.",
            )
        return size

    def _forward(self) -> Callable[[Tensor], Tensor]:
        """The network as it is called in training: it exchanges gradients, and is compiled, where that is asked."""
        forward: Any = self.model
        if self.world.size > 1:
            on_card = self.device.type == "cuda"
            forward = nn.parallel.DistributedDataParallel(
                forward, device_ids=[self.device.index] if on_card else None
            )
        compiled: Any = torch.compile(forward) if self.recipe.compile else forward
        return cast(Callable[[Tensor], Tensor], compiled)

    def how_to_go_on(self) -> str:
        """The command that resumes this run."""
        where = f" --data-dir {shlex.quote(str(self.data_dir))}" if self.data_dir else ""
        return f"Go on with: sparse-export train --resume --out {shlex.quote(str(self.out))}{where}"

    def _require_fit(self, input_shape: tuple[int, ...], n_classes: int) -> int:
        """The number of the network's outputs. Raises UsageError when it cannot take this data."""
        self.model.eval()
        try:
            sample = self._laid_out(torch.zeros((2, *input_shape), device=self.device))
            with torch.no_grad():
                output = self.model(sample)  # lazy layers have shapes from here on
                self.output_layers = output_layers(self.model, lambda: self.model(sample))
        except Exception as cause:  # whatever a network raises: some assert, some index
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

    def _sparsifier(self) -> Sparsifier:
        """What keeps the network sparse, by the recipe's method."""
        return make_sparsifier(
            self.recipe,
            self.model,
            self.optimizer,
            self.total_steps,
            output_layers=self.output_layers,
            sensitivity_masks=self._snip_masks,
        )

    def _snip_masks(self) -> dict[str, Tensor]:
        """Start masks by the sensitivity of the loss of the first batch."""
        settings = self.recipe.sparsity
        order = torch.randperm(self.feed.fact.n_train, generator=self._generator(_ORDER, 0))
        x, y = next(iter(self.feed.training(order[: self.batch_size], self.batch_size, 0, 0)))
        self._seed(0)
        return snip_masks(
            self.model,
            lambda: (
                nn.functional.cross_entropy(self.model(self._laid_out(x)), y) * (len(y) / self.batch_size)
            ),
            density=settings.wanted_density or 1.0,
            keep_dense=settings.keep_dense,
            combine=dist.all_reduce if self.world.size > 1 else None,
        )

    def _laid_out(self, x: Tensor) -> Tensor:
        """Inputs in the memory order that the recipe asks for."""
        if self.recipe.channels_last and x.ndim == 4:
            return x.contiguous(memory_format=torch.channels_last)
        return x

    def _info(self) -> RunInfo:
        sparse = self.sparse
        weights = maskable_parameters(self.model)
        n_masked = sparse.n_masked if sparse else sum(value.numel() for value in weights.values())
        return RunInfo(
            status="running",
            method=self._method or (self.recipe.sparsity.method if sparse else "dense"),
            model=ModelFact(
                name=self.recipe.model,
                input_shape=self.feed.input_shape,
                n_classes=self.n_outputs,
            ),
            data=self.feed.fact,
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
            device=self.device.type,
            n_processes=self.world.size,
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
        facts = self.sparse.layer_facts() if self.sparse else layer_facts(self.model, {})
        if self._promises is None:
            return facts
        patterns, why_dense = self._promises
        return tuple(
            replace(fact, pattern=patterns.get(fact.name), why_dense=why_dense.get(fact.name))
            for fact in facts
        )

    def train(self, observer: Observer, stop: Stop) -> Run:
        first = self.world.is_first
        if first:
            write_run_info(self.out, self.info)
        observer = observer if first else SilentObserver()
        observer.started(self.info, self.total_steps, self.position.step)
        with (
            MetricsLog(self.out, self.position.metrics_bytes, self.position.epoch)
            if first
            else nullcontext() as log
        ):
            while self.position.epoch < self.recipe.epochs:
                self._train_epoch(observer, stop, log)
        if self.products is not None:
            self.products.restore()  # what is tested and handed on has ordinary layers
        info = replace(
            self.info,
            validation=self._accuracy("validation"),
            test=self._accuracy("test"),
            layers=self._layer_facts(),
            seconds=self.position.seconds,
        )
        return self._finish(info)

    def _finish(self, info: RunInfo) -> Run:
        """Write the run, with the averaged weights where there are any; every process returns it.

        The run is complete before its speed is looked at: nothing that only estimates may cost a training.
        """
        masks = self.sparse.masks if self.sparse else {}
        with self.ema.swapped_in() if self.ema else nullcontext():
            run = finish_run(self.out, self.model, masks, info) if self.world.is_first else None
        if run is not None:
            run = replace(run, info=replace(run.info, speed=self._speed()))
            write_run_info(self.out, run.info)
        if self.world.size == 1 and run is not None:
            return run
        whole: list[Any] = [None if run is None else run.info]
        dist.broadcast_object_list(whole, src=0, group=self.world.control)
        return Run(path=self.out, info=whole[0])

    def _train_epoch(self, observer: Observer, stop: Stop, log: MetricsLog | None) -> None:
        epoch, at = self.position.epoch, self.position
        # The order of an epoch follows from the seed and the epoch alone, so it can be made again on resume.
        order = torch.randperm(self.feed.fact.n_train, generator=self._generator(_ORDER, epoch))
        started = saved = time.monotonic()
        # The CPU's loss is read at every step; an accelerator's is summed there, so that the host need not wait.
        on_cpu, alone = self.device.type == "cpu", self.world.size == 1
        total: float | Tensor = at.loss_sum if self.world.is_first else 0.0
        if not on_cpu:
            total = torch.tensor(total, dtype=torch.float64, device=self.device)
        step = at.step
        agreement = Agreement(self.world)
        n_updates = self.sparse.n_updates if self.sparse else 0
        self._n_updates_before_epoch = at.n_updates_before if at.step_in_epoch else n_updates
        self.model.train()

        def position(*, epoch: int = epoch, step_in_epoch: int = 0, loss_sum: float = 0.0) -> Position:
            return Position(
                step=step,
                epoch=epoch,
                step_in_epoch=step_in_epoch,
                loss_sum=loss_sum,
                n_updates_before=self._n_updates_before_epoch,
                seconds=at.seconds + time.monotonic() - started,
                metrics_bytes=log.size_bytes if log else 0,
            )

        batches = self.feed.training(order, self.batch_size, epoch, at.step_in_epoch)
        for place, (x, y) in enumerate(batches, start=at.step_in_epoch):
            loss = self._step(x, y, step)
            here = loss.item() if on_cpu else 0.0
            total = total + (here if on_cpu else loss.detach().double())
            if (alone and on_cpu) or (not on_cpu and step % _CHECK_EVERY == 0):
                self._require_finite(total, step)
            self._step_weights(step)
            step += 1
            observer.stepped(step, loss)
            due = self.world.is_first and time.monotonic() - saved > _SAVE_EVERY_S
            agreed = agreement.exchange(stop=stop.requested, save=due, loss=here)
            self._require_finite(agreed.loss, step - 1)
            if agreed.stop or agreed.save:
                (loss_sum,) = self.world.sum([float(total)])
                self._require_finite(loss_sum, step - 1)
                self._save(position(step_in_epoch=place + 1, loss_sum=loss_sum))
                saved = time.monotonic()
            if agreed.stop:
                self.world.wait()
                raise Interrupted(
                    f"Stopped after step {step} of {self.total_steps}; nothing is lost.",
                    do=self.how_to_go_on(),
                )
        agreement.finish()
        (loss_sum,) = self.world.sum([float(total)])
        self._require_finite(loss_sum, step - 1)
        step_ms = 1000 * (time.monotonic() - started) / (step - at.step) if step > at.step else None
        if self.products is not None:
            self.products.sync()
        validation = self._accuracy("validation")
        update_ms = self._end_of_epoch_update(epoch)
        rate_used, flip_rate = self._last_update()
        metrics = EpochMetrics(
            epoch=epoch + 1,
            step=step,
            train_loss=loss_sum / self.steps_per_epoch,
            validation_percent=None if validation is None else validation.percent,
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
            density=self.sparse.density_now if self.sparse else 1.0,
            layer_density={fact.name: fact.density for fact in self._layer_facts() if fact.masked},
            prune_rate=rate_used,
            flip_rate=flip_rate,
            masks_sha256=masks_sha256(self.sparse.masks) if self.sparse else None,
            seconds=at.seconds + time.monotonic() - started,
            step_ms=step_ms,
            layer_use=self._layer_uses(),
            update_ms=update_ms,
        )
        if log is not None:
            log.write(metrics)
        self.position = position(epoch=epoch + 1)
        self._save(self.position)
        observer.finished_epoch(metrics)

    def _probe(self) -> Tensor | None:
        """A batch of the validation part, for looking at layers; None where there is none, or in other processes."""
        if not self.world.is_first:
            return None
        batch = next(iter(self.feed.part("validation", min(self.batch_size, _USE_BATCH))), None)
        return None if batch is None else self._laid_out(batch[0])

    def _layer_uses(self) -> dict[str, LayerUse]:
        x = self._probe()
        return {} if x is None else layer_uses(self.model, x)

    def _speed(self) -> SpeedFact | None:
        return speed_of(self.model, self._probe(), read_metrics(self.out))

    def _step(self, x: Tensor, y: Tensor, step: int) -> Tensor:
        """Forward and backward, and where it is captured the weights' step too.

        Gives this process's part of the batch's mean loss: the parts add up to it.
        """
        self._seed(step)
        rate = learning_rate(*self._place(step), self.recipe.optimizer.lr, self.recipe.learning_rate)
        set_rate(self.optimizer, rate)
        if self.recipe.augment == "crop-flip":
            crops = draw_crops(self.batch_size, self._generator(_AUGMENTATION, step))
            x = crop_flip(x, self.world.share(crops.T).T)
        x = self._laid_out(x)
        return self._gradients(x, y) if self._captured is None else self._captured(x, y)

    def _whole_step(self, x: Tensor, y: Tensor) -> Tensor:
        """What a CUDA graph holds: everything of a step but what its number decides."""
        loss = self._gradients(x, y)
        self.optimizer.step()
        if isinstance(self.sparse, SparseTraining):
            self.sparse.apply_masks()
        return loss

    def _gradients(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            loss = nn.functional.cross_entropy(
                self.forward(x), y, label_smoothing=self.recipe.label_smoothing
            )
        if self.world.size == 1:
            loss.backward()
            return loss
        part = loss * (len(y) / self.batch_size)
        # Gradients are averaged over the processes, which divides by their number.
        (part * self.world.size).backward()
        return part

    def _place(self, step: int) -> tuple[int, int]:
        """(step, of how many) in the learning rate's schedule, which asp runs through twice."""
        if self.recipe.dense or self.recipe.sparsity.method != "asp":
            return step, self.total_steps
        cut = round(ASP_CUT * self.total_steps)
        return (step, cut) if step < cut else (step - cut, self.total_steps - cut)

    def _generator(self, purpose: int, place: int) -> torch.Generator:
        """Randomness that follows from the seed and a place in the run alone: nothing to save, nothing to restore."""
        return torch.Generator().manual_seed(purpose + self.recipe.seed * 1_000_003 + place)

    def _seed(self, step: int) -> None:
        """The same for what the network draws, as dropout does; every process draws its own."""
        key = hashlib.sha256(f"{self.recipe.seed} {step} {self.world.rank}".encode()).digest()
        seed = int.from_bytes(key[:7], "big")
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _save(self, position: Position) -> None:
        """Write the state, which is what a later failure falls back on, so only while it is finite."""
        self._require_finite_weights(position.step)
        if self.world.is_first:
            save_state(self.out, position, self.model, self.optimizer, self.sparse, self.ema)

    def _require_finite_weights(self, step: int) -> None:
        values = [value for value in self.model.state_dict().values() if value.is_floating_point()]
        if not bool(torch.stack([value.isfinite().all() for value in values]).all()):
            raise self._diverged(step - 1, "The weights are no longer numbers.")

    def _step_weights(self, step: int) -> None:
        with self._numbers_expected(step):
            if self._captured is None:
                (self.optimizer if self.sparse is None else self.sparse).step()
            elif isinstance(self.sparse, SparseTraining):
                self.sparse.advance()
        if self.products is not None:
            self.products.after_step()
        if self.ema is not None:
            self.ema.step()
            self._mask_average()

    @contextmanager
    def _numbers_expected(self, step: int) -> Iterator[None]:
        """A mask update that meets weights or momenta that are no numbers ends the training as diverged."""
        try:
            yield
        except UsageError:
            raise
        except ValueError as cause:
            raise self._diverged(step, f"The weights are no longer numbers: {cause}") from cause

    def _mask_average(self) -> None:
        """The average holds the past of a weight that was pruned: zero it, once after each mask update."""
        if (
            self.ema is not None
            and self.sparse is not None
            and self.sparse.n_updates != self._n_updates_averaged
        ):
            self.ema.mask(self.sparse.masks)
            self._n_updates_averaged = self.sparse.n_updates

    def _end_of_epoch_update(self, epoch: int) -> float | None:
        """Update the masks where the recipe says once an epoch, but not after the last: wall time in ms, None without."""
        sparse = self.sparse
        if not isinstance(sparse, SparseTraining) or not self._is_update_due(sparse, epoch):
            return None
        began = self._now()
        with self._numbers_expected(sparse.n_steps - 1):
            sparse.update()
        if self.products is not None:
            self.products.after_step()
        self._mask_average()
        return 1000 * (self._now() - began)

    def _now(self) -> float:
        """Seconds on a monotonic clock, when the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()

    def _last_update(self) -> tuple[float | None, float | None]:
        """(prune rate, flip rate) of the epoch's last update, wherever in the epoch it was; None where there was none."""
        sparse = self.sparse
        if sparse is not None and sparse.n_updates > self._n_updates_before_epoch:
            return sparse.last_prune_rate, sparse.flip_rate
        return None, None

    def _is_update_due(self, sparse: SparseTraining, epoch: int) -> bool:
        return sparse.update_every is None and epoch + 1 < self.recipe.epochs and not sparse.is_frozen

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
    def _accuracy(self, name: Part) -> Accuracy | None:
        """Of the network as it would be saved, in float32, over all processes; None for an empty part."""
        n_samples = self.feed.fact.n_validation if name == "validation" else self.feed.fact.n_test
        if n_samples == 0:
            return None
        self.model.eval()
        # Batch statistics are each process's own until the next step copies those of rank 0; so does a resumed run.
        self.world.copy_from_first([value for value in self.model.buffers() if value.numel()])
        if self.ema is not None:
            self.world.copy_from_first(list(self.ema.average.values()))
        size = max(1, min(_TEST_BATCH, _TEST_VALUES // max(1, math.prod(self.feed.input_shape))))
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        exact = self.products.paused() if isinstance(self.products, Step24) else nullcontext()
        with self.ema.swapped_in() if self.ema else nullcontext(), exact:
            for x, y in self.feed.part(name, size):
                correct += (self.model(self._laid_out(x)).argmax(1) == y).sum()
        (n_correct,) = self.world.sum([float(correct)])
        return Accuracy(n_correct=round(n_correct), n_samples=n_samples)


def _require_possible(recipe: Recipe, device: torch.device, world: World) -> None:
    """Raise UsageError or MissingCapability for what this device cannot do."""
    if recipe.sparsity.products == "csr" and not recipe.dense and (device.type != "cpu" or world.size > 1):
        raise UsageError(
            f"CSR products were asked for on {device.type}, with {world.size} processes.",
            expected="One process on the CPU was expected.",
            do="Train with --device cpu, or with dense products.",
        )
    if recipe.sparsity.products == "2:4" and not recipe.dense:
        require_backend(step24.BACKEND_24, device)
    if recipe.sync_batch_norm and device.type != "cuda":
        raise UsageError(
            f"sync_batch_norm is set, and the device is {device.type}.",
            expected="A CUDA device was expected: torch has no such layer elsewhere.",
            do="Leave sync_batch_norm out of the recipe.",
        )
    if recipe.cuda_graph and (device.type != "cuda" or world.size > 1):
        raise UsageError(
            f"cuda_graph is set, on {device.type} with {world.size} process{'es' if world.size > 1 else ''}.",
            expected="One process on a CUDA device was expected.",
            do="Leave cuda_graph out of the recipe.",
        )
    if not recipe.compile:
        return
    variable, compilers = (
        ("CXX", ("g++", "clang++")) if device.type == "cpu" else ("CC", ("gcc", "clang", "cc"))
    )
    wanted = (os.environ[variable],) if os.environ.get(variable) else compilers
    if not any(shutil.which(name) for name in wanted):
        raise MissingCapability(
            f"compile is set, and no compiler is there: looked for {', '.join(wanted)}.",
            expected="One was expected, which torch.compile calls.",
            do="Install one (on Debian and Ubuntu: apt install g++), or leave compile out of the recipe.",
        )


def _promises(
    earlier: RunInfo | None, start: StartingPoint | None
) -> tuple[Mapping[str, str], Mapping[str, str]] | None:
    """The patterns of layers, and why others have none, in a run that began at given weights; else the recipe's hold."""
    if earlier is None:
        return (start.patterns, start.why_dense) if start is not None else None
    if not earlier.method.startswith(STARTED):
        return None
    return (
        {layer.name: layer.pattern for layer in earlier.layers if layer.pattern is not None},
        {layer.name: layer.why_dense for layer in earlier.layers if layer.why_dense is not None},
    )


def n_threads_for(model: nn.Module, batch_size: int) -> int:
    """One thread for a network whose step is too short to share, else torch's own choice.

    A function of the network, not of a timing, so that a recipe gives the same bits on every run.
    """
    n_weights = sum(value.numel() for value in model.parameters())
    return 1 if n_weights * batch_size <= _SINGLE_THREAD_WORK else torch.get_num_threads()
