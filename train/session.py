"""One training run under way: its epochs, what it saves and records, how it is resumed."""

from __future__ import annotations

import shlex
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_export.errors import ArtefactError, Interrupted, UsageError
from sparse_export.formats.run import CostInfo, LayerInfo, ModelInfo, Run, RunInfo, SpeedInfo, TaskInfo
from sparse_export.formats.score import Score
from sparse_export.graph.call_record import call_of
from sparse_export.graph.example import example_of_shape
from sparse_export.graph.named_network import signature_of_call
from sparse_export.models.weights import load_unversioned
from sparse_export.signature import Signature, class_signature
from sparse_export.tasks.class_names import with_class_names
from sparse_export.tasks.samples import n_outputs_of
from sparse_export.tasks.scores import value_text
from sparse_export.tasks.shipped import Classification, task_named
from sparse_export.train.batches import batch_loader, whole_batch
from sparse_export.train.best_state import BestState, is_as_sparse_as_wanted
from sparse_export.train.checkpoint import Position, load_state, save_state, state_path
from sparse_export.train.cost import cost_of
from sparse_export.train.device_limits import require_possible
from sparse_export.train.distributed import Agreement, World, masks_sha256
from sparse_export.train.divergence import FiniteNumbers
from sparse_export.train.ema import Ema
from sparse_export.train.epoch import EpochSoFar
from sparse_export.train.evaluation import score_of_part, statistics_of
from sparse_export.train.factory import make_sparsifier
from sparse_export.train.inputs import ModelInputs, called
from sparse_export.train.layers import layer_facts
from sparse_export.train.loader import BatchLoader, Part
from sparse_export.train.loss import loss_of
from sparse_export.train.methods.dense import DENSE
from sparse_export.train.metrics import EpochMetrics, MetricsLog, read_metrics
from sparse_export.train.network import (
    in_memory_format,
    make_network,
    n_threads_for,
    named_example,
    require_fit,
    wrapped_for_training,
)
from sparse_export.train.observer import Observer, SilentObserver
from sparse_export.train.optimizer import make_optimizer
from sparse_export.train.products import make_products
from sparse_export.train.randomness import epoch_order, seed_step
from sparse_export.train.recipe import Recipe
from sparse_export.train.record import n_entries, new_run_info
from sparse_export.train.run_folder import finish_run, remove_unstarted, require_empty, write_run_info
from sparse_export.train.sparsifier import Sparsifier
from sparse_export.train.speed import LayerUse, layer_uses, speed_of
from sparse_export.train.starting_point import STARTED, StartingPoint, promises_of
from sparse_export.train.stepper import Stepper
from sparse_export.train.stopping import Stop
from sparse_export.train.teacher import Teacher, layers_learnt, read_teacher, save_teacher

_SAVE_EVERY_S = 120.0  # within a long epoch
_CHECK_EVERY = 50  # steps between looks at an accelerator's loss
_USE_BATCH = 128  # most samples of the batch that shows what layers have to do


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
        """Check everything before anything is written. start: in place of fresh weights and masks."""
        self.recipe, self.out, self.data_dir = recipe, out, data_dir
        self.device, self.world = device, world
        require_possible(recipe, device, world)
        if recipe.distill and earlier is None and (start is None or start.teacher is None):
            raise UsageError(
                "distill is set, and there is no dense network to learn from.",
                do="Leave it out of the recipe; `sparse-export sparsify --finetune --distill` sets it.",
            )
        if earlier is None:
            if world.is_first:
                remove_unstarted(out)
            world.wait()
            require_empty(out)
        world.wait()  # nobody writes before everybody has looked
        self.loader: BatchLoader = batch_loader(recipe, data_dir, download, device, world)
        if earlier is not None:
            self._require_same_data(earlier)
        torch.manual_seed(recipe.seed)
        n_outputs = (
            n_outputs_of(earlier.signature)
            if earlier
            else start.n_outputs
            if start
            else self.loader.n_outputs
        )
        self.model = make_network(recipe, n_outputs, device, world)
        self.outputs = require_fit(self.model, recipe, self.loader.sample(2), self.loader.n_outputs)
        self._require_scorable()
        self.best = self._best_state(earlier)
        self._example = named_example(self.model, recipe, self.loader.sample(2))
        self.batch_size = whole_batch(recipe, self.loader, world)
        self.steps_per_epoch = self.loader.info.n_train // self.batch_size
        self.total_steps = self.steps_per_epoch * recipe.epochs
        self.numbers = FiniteNumbers(run=out, n_steps=self.total_steps)
        self.optimizer = make_optimizer(recipe.optimizer, self.model)
        self.sparse = None if recipe.dense else self._sparsifier()
        self._promises = promises_of(earlier, start)
        if start is not None:
            self._begin_at(start)
        self.ema = Ema(self.model, recipe.ema) if recipe.ema else None
        forward = wrapped_for_training(self.model, recipe, device, world)
        self.position = Position()
        self.n_threads = recipe.threads or n_threads_for(self.model, self.batch_size)
        self.info = self._started_info(earlier.method if earlier else start.method if start else None)
        if earlier is not None:
            self._resume(earlier)
        elif start is not None:
            if start.teacher is not None and world.is_first:
                save_teacher(out, start.teacher)
            self._save(self.position)  # a run that is killed early is not resumed from fresh weights
        self.products, facts = make_products(
            recipe,
            self.model,
            self.sparse,
            self._sample,
            earlier=earlier.products if earlier else (),
            n_threads=self.n_threads,
            steps_per_epoch=self.steps_per_epoch,
        )
        self.info = replace(self.info, products=facts)
        self.stepper = Stepper(
            recipe,
            self.model,
            forward,
            self.optimizer,
            self.sparse,
            self.ema,
            self.products,
            device=device,
            world=world,
            batch_size=self.batch_size,
            numbers=self.numbers,
            teacher=self._teacher() if recipe.distill else None,
        )

    def _teacher(self) -> Teacher:
        """The network whose outputs are learnt."""
        self.world.wait()  # until its weights are written
        n_outputs = n_outputs_of(self.info.signature)
        network = make_network(self.recipe, n_outputs, self.device, self.world)
        layers = layers_learnt(self.recipe.distill, self.sparse.masks if self.sparse else ())
        return Teacher(read_teacher(network, self.out), task_named(self.recipe.task), layers)

    def _best_state(self, earlier: RunInfo | None) -> BestState | None:
        """Where the best epoch is kept; None where the last one is. Raises UsageError without validation."""
        if self.recipe.keep == "last":
            return None
        if not self.loader.info.n_validation:
            raise UsageError(
                f"keep is 'best', and {self.recipe.data} has no validation part to choose by.",
                do="Set validation_fraction in the recipe, or leave keep out.",
            )
        return BestState(self.out, resumed=earlier is not None)

    @torch.no_grad()
    def _require_scorable(self) -> None:
        """Try the loss and the score of another task than classification on two samples, before anything is
        written.

        Raises UsageError.
        """
        recipe, task = self.recipe, task_named(self.recipe.task)
        parts: tuple[Part, ...] = ("validation", "test")
        batches = (batch for name in parts for batch in self.loader.part(name, 2))
        found = None if isinstance(task, Classification) else next(batches, None)
        if found is None:
            return
        outputs = called(self.model.eval(), in_memory_format(recipe, found[0]))
        try:
            loss_of(recipe)(outputs, found[1])
        except UsageError:
            raise
        except Exception as cause:  # whatever a loss raises
            raise UsageError(
                f"The loss of the task {recipe.task} cannot be computed on two samples of {recipe.data}: "
                f"{next(iter(str(cause).splitlines()), type(cause).__name__)}.",
                do="Give targets, and a network, of one shape; or call the loss in Python.",
            ) from cause
        statistics_of(task, lambda _: outputs, [found])

    def _require_same_data(self, earlier: RunInfo) -> None:
        if earlier.data != self.loader.info:
            before, now = asdict(earlier.data) if earlier.data else {}, asdict(self.loader.info)
            differs = [
                f"{key} is {now[key]}, not {before.get(key)}" for key in now if now[key] != before.get(key)
            ]
            raise ArtefactError(
                f"The data differ from those that the run in {self.out} was started with: "
                f"{', '.join(differs)}.",
                do="Give the folder with the original data by --data-dir.",
            )

    def _sparsifier(self) -> Sparsifier:
        """What keeps the network sparse, by the recipe's method."""
        return make_sparsifier(
            self.recipe,
            self.model,
            self.optimizer,
            self.total_steps,
            output_layers=self.outputs.layers,
            first_loss=self._first_loss,
            unfit=self.outputs.unfit,
            combine=dist.all_reduce if self.world.size > 1 else None,
        )

    def _first_loss(self) -> Tensor:
        """This process's part of the mean loss of the first batch."""
        recipe = self.recipe
        order = epoch_order(recipe.seed, 0, self.loader.info.n_train)
        x, y = next(iter(self.loader.training(order[: self.batch_size], self.batch_size, 0, 0)))
        seed_step(recipe.seed, 0, self.world.rank, self.device)
        outputs = called(self.model, in_memory_format(recipe, x))
        return loss_of(recipe)(outputs, y) * (len(y) / self.batch_size)

    def _begin_at(self, start: StartingPoint) -> None:
        state = None if self.sparse is None else self.sparse.state_dict()
        load_unversioned(self.model, start.weights)
        if self.sparse is not None and state is not None:
            self.sparse.load_state_dict(state | {"masks": dict(start.masks)})

    def _started_info(self, method: str | None) -> RunInfo:
        """The record, without results. method: of the record; None for the recipe's."""
        recipe, sparse = self.recipe, self.sparse
        return new_run_info(
            n_parameters=n_entries(self.model),
            method=method or (recipe.sparsity.method if sparse else DENSE.name),
            model=ModelInfo(name=recipe.model),
            signature=self._signature(),
            data=self.loader.info,
            task=with_class_names(TaskInfo(name=recipe.task), self.loader.class_names, self.outputs.n),
            layers=self._layer_facts(),
            n_active=sparse.n_active if sparse else None,
            target_density=sparse.density if sparse else None,
            call=None if self._example is None else call_of(self._example),
            seed=recipe.seed,
            n_threads=self.n_threads,
            device=self.device.type,
            n_processes=self.world.size,
            epochs=recipe.epochs,
            n_steps=self.total_steps,
            recipe=recipe.model_dump(mode="json"),
        )

    def _signature(self) -> Signature:
        """What the network takes and gives."""
        task = task_named(self.recipe.task)
        if self._example is not None:
            example = replace(self._example, lone_output=task.output_name)
            return signature_of_call(self.model.eval(), example).with_ranges(self.loader.ranges())
        if isinstance(task, Classification) and self.outputs.n is not None:
            return class_signature(self.loader.input_shape, self.outputs.n)
        example = replace(example_of_shape(self.loader.input_shape), lone_output=task.output_name)
        return signature_of_call(self.model.eval(), example.on(self.device))

    def _resume(self, earlier: RunInfo) -> None:
        """Take up the saved state, if the run came so far, and what the record has of how it was started."""
        if earlier.n_processes == self.world.size:
            self.n_threads = earlier.n_threads
        self.info = replace(
            self.info, n_threads=self.n_threads, created=earlier.created, command=earlier.command
        )
        if state_path(self.out).is_file():
            self.position = load_state(self.out, self.model, self.optimizer, self.sparse, self.ema)
        elif earlier.method.startswith(STARTED):
            raise ArtefactError(
                f"{state_path(self.out)} is missing, and the run in {self.out} did not begin at fresh "
                "weights.",
                expected="The weights that it began at were expected there.",
                do="Start the run again in another folder.",
            )

    def _sample(self) -> ModelInputs:
        """Inputs like those of a step: of a batch, this process's share."""
        return in_memory_format(self.recipe, self.loader.sample(max(1, self.batch_size // self.world.size)))

    def how_to_go_on(self) -> str:
        """The command that resumes this run."""
        where = f" --data-dir {shlex.quote(str(self.data_dir))}" if self.data_dir else ""
        return f"Go on with: sparse-export train --resume --out {shlex.quote(str(self.out))}{where}"

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
        kept_epoch = self._put_best_back()
        info = replace(
            self.info,
            signature=self.info.signature.with_ranges(self.loader.ranges()),
            validation=self._score("validation"),
            test=self._score("test"),
            layers=self._layer_facts(),
            seconds=self.position.seconds,
            kept_epoch=kept_epoch,
        )
        return self._finish(info)

    def _put_best_back(self) -> int | None:
        """Go back to the best epoch; gives its number, None where the last one is kept."""
        if self.best is None or self.best.epoch is None:
            return None
        self.world.wait()  # until it is written
        self.best.put_back(self.model, self.sparse.masks if self.sparse else {})
        self.ema = None  # its average is what was kept
        return self.best.epoch

    @torch.no_grad()
    def _keep_if_best(self, validation: Score | None, epoch: int) -> None:
        best = self.best
        if best is None or validation is None or not best.is_beaten_by(validation):
            return
        if not is_as_sparse_as_wanted(self.model, self.sparse):
            return
        masks = self.sparse.masks if self.sparse else {}
        with self.ema.swapped_in() if self.ema else nullcontext():
            best.keep(self.model, masks, validation, epoch, write=self.world.is_first)

    def _train_epoch(self, observer: Observer, stop: Stop, log: MetricsLog | None) -> None:
        at, world = self.position, self.world
        # The order of an epoch follows from the seed and the epoch alone, so it can be made again on resume.
        order = epoch_order(self.recipe.seed, at.epoch, self.loader.info.n_train)
        n_updates = self.sparse.n_updates if self.sparse else 0
        epoch = EpochSoFar.taken_up(at, n_updates, is_first=world.is_first, device=self.device)
        saved = epoch.began
        agreement = Agreement(world)
        self.model.train()
        batches = self.loader.training(order, self.batch_size, at.epoch, at.step_in_epoch)
        for place, (x, y) in enumerate(batches, start=at.step_in_epoch):
            loss = self.stepper.step_gradients(x, y, epoch.step)
            here = epoch.add(loss)
            if self._is_loss_checked(epoch.step):
                self.numbers.require_loss(epoch.loss_here, epoch.step)
            self.stepper.step_weights(epoch.step)
            epoch.step += 1
            observer.stepped(epoch.step, loss)
            due = world.is_first and time.monotonic() - saved > _SAVE_EVERY_S
            agreed = agreement.exchange(stop=stop.requested, save=due, loss=here)
            self.numbers.require_loss(agreed.loss, epoch.step - 1)
            if agreed.stop or agreed.save:
                loss_sum = self._loss_sum(epoch)
                size = log.size_bytes if log else 0
                self._save(epoch.position(step_in_epoch=place + 1, loss_sum=loss_sum, metrics_bytes=size))
                saved = time.monotonic()
            if agreed.stop:
                world.wait()
                raise Interrupted(
                    f"Stopped after step {epoch.step} of {self.total_steps}; nothing is lost.",
                    do=self.how_to_go_on(),
                )
        agreement.finish()
        self._end_epoch(epoch, observer, log)

    def _is_loss_checked(self, step: int) -> bool:
        """On the CPU always: alone here, else when the processes agree. On an accelerator now and then."""
        if self.device.type == "cpu":
            return self.world.size == 1
        return step % _CHECK_EVERY == 0

    def _loss_sum(self, epoch: EpochSoFar) -> float:
        """Over the epoch's steps so far and all processes. Raises TrainingDiverged when it is no number."""
        (loss_sum,) = self.world.sum([float(epoch.loss_here)])
        self.numbers.require_loss(loss_sum, epoch.step - 1)
        return loss_sum

    def _end_epoch(self, epoch: EpochSoFar, observer: Observer, log: MetricsLog | None) -> None:
        """Validate, update the masks where that is due, record the epoch and save."""
        loss_sum = self._loss_sum(epoch)
        step_ms = epoch.step_ms
        if self.products is not None:
            self.products.sync()
        validation = self._score("validation")
        self._keep_if_best(validation, epoch.at.epoch + 1)
        update_ms = self.stepper.update_after_epoch(epoch.at.epoch)
        sparse = self.sparse
        updated = sparse if sparse is not None and sparse.n_updates > epoch.n_updates_before else None
        metrics = EpochMetrics(
            epoch=epoch.at.epoch + 1,
            step=epoch.step,
            train_loss=loss_sum / self.steps_per_epoch,
            validation_score=None if validation is None else validation.figure,
            validation=None if validation is None else f"{validation.name} {value_text(validation)}",
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
            density=sparse.density_now if sparse else 1.0,
            layer_density={fact.name: fact.density for fact in self._layer_facts() if fact.masked},
            prune_rate=updated.last_prune_rate if updated else None,
            flip_rate=updated.flip_rate if updated else None,
            masks_sha256=masks_sha256(sparse.masks) if sparse else None,
            seconds=epoch.seconds,
            step_ms=step_ms,
            layer_use=self._layer_uses(),
            update_ms=update_ms,
            explored=sparse.explored if sparse else 1.0,
        )
        if log is not None:
            log.write(metrics)
        self.position = epoch.position_after(metrics_bytes=log.size_bytes if log else 0)
        self._save(self.position)
        observer.finished_epoch(metrics)

    def _save(self, position: Position) -> None:
        """Write the state, which is what a later failure falls back on, so only while it is finite."""
        self.numbers.require_weights(self.model, position.step - 1)
        if self.world.is_first:
            save_state(self.out, position, self.model, self.optimizer, self.sparse, self.ema)

    def _finish(self, info: RunInfo) -> Run:
        """Write the run, with the averaged weights where there are any; every process returns it.

        The run is complete before its speed is looked at: nothing that only estimates may cost a training.
        """
        masks = self.sparse.masks if self.sparse else {}
        info = replace(info, cost=self._cost())
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

    def _score(self, name: Part) -> Score | None:
        """See `score_of_part`."""
        return score_of_part(
            name,
            self.loader,
            self.recipe,
            self.model,
            self.ema,
            self.products,
            device=self.device,
            world=self.world,
        )

    def _layer_facts(self) -> tuple[LayerInfo, ...]:
        facts = self.sparse.layer_facts() if self.sparse else layer_facts(self.model, {})
        return facts if self._promises is None else self._promises.said_of(facts)

    def _probe(self) -> ModelInputs | None:
        """A batch of the validation part, for looking at layers; None without one, and in later ranks."""
        if not self.world.is_first:
            return None
        batch = next(iter(self.loader.part("validation", min(self.batch_size, _USE_BATCH))), None)
        return None if batch is None else in_memory_format(self.recipe, batch[0])

    def _layer_uses(self) -> dict[str, LayerUse]:
        x = self._probe()
        return {} if x is None else layer_uses(self.model, x)

    def _cost(self) -> CostInfo:
        """See `cost_of`. Batches of the validation part are looked at, where there is one."""
        return cost_of(
            self.model,
            self._probe(),
            self.sparse,
            n_steps=self.total_steps,
            batch_size=self.batch_size,
            freeze=self.recipe.sparsity.wanted_freeze,
        )

    def _speed(self) -> SpeedInfo | None:
        return speed_of(self.model, self._probe(), read_metrics(self.out))
