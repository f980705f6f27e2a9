"""Trains one network by one recipe, and can go on where it was stopped."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch

from sparse_export import models
from sparse_export import trust as trust_store
from sparse_export.errors import ArtefactError, MissingCapability, RecipeError, UsageError
from sparse_export.files import sha256_file
from sparse_export.formats.run import RUN_FILE, Run, RunInfo, open_run, read_run_info
from sparse_export.tasks.data.pictures import workers_watched
from sparse_export.train.distributed import (
    ALONE,
    World,
    is_first_process,
    joined,
    others_reachable,
    was_restarted,
)
from sparse_export.train.observer import Observer, SilentObserver
from sparse_export.train.recipe import Recipe, load_recipe, recipe_from_table
from sparse_export.train.run_folder import claimed_run
from sparse_export.train.session import Session
from sparse_export.train.starting_point import StartingPoint
from sparse_export.train.stopping import cpu_settings, stop_signals


def train(
    recipe: Recipe | str | Path | None,
    out: str | Path,
    *,
    data_dir: Path | None = None,
    download: bool = False,
    device: str = "auto",
    workers: int | None = None,
    resume: bool = False,
    trust: str | None = None,
    observer: Observer | None = None,
    start: StartingPoint | None = None,
) -> Run:
    """Train by a recipe (an object, a shipped name or a TOML path) into the run folder `out`.

    The last tenth of the training set (`validation_fraction`) is for choices; the test set is read once, at
    the end.

    Under torchrun the processes train one network together: each takes its share of every batch, rank 0
    writes the run, and all of them need to see its folder in order to resume. A run may be resumed by another
    number of processes, and on another kind of device. Processes that torchrun has started anew resume by
    themselves.

    One process at a time writes a run, under torchrun rank 0 for all of them: see
    `sparse_export.files.locks`.

    Args:
        recipe: an object, a shipped name or a TOML path; None with `resume`.
        out: folder of the run.
        data_dir: where the data sets lie.
        download: fetch the data set when it is not there.
        device: `auto`, `cpu` or `cuda`.
        workers: processes that decode pictures, in place of the recipe's number.
        resume: go on with the unfinished run in `out` instead, by the recipe that it was started with; a
            finished one is returned as it is. On the CPU a resumed run ends with the bits of an unbroken one.
        trust: SHA-256 of a `run.json` whose factory may be imported though this user did not write it.
        observer: is called while training goes on.
        start: weights and masks to begin at; a resumed run has them in its saved state.

    Returns:
        The finished run.

    Raises:
        UsageError: the recipe, the data and the machine do not go together.
        FolderInUse: another process writes the folder.
        DataNotFound: the data set is not there.
        OutputError: the folder cannot be written.
        TrainingDiverged: numbers are no longer finite; the last good state is kept.
        Interrupted: on SIGINT or SIGTERM, after saving.
        ProcessLost, RanksDiverged: under torchrun.
        NotTrustedError: a resumed run names a factory that nobody vouches for.
    """
    out = Path(out)
    if was_restarted() and (out / RUN_FILE).is_file():
        resume = True
    if resume and read_run_info(out).status == "complete":
        return open_run(out)  # nothing is written, so nothing is locked
    if not resume:
        if recipe is None:
            raise UsageError(
                "No recipe was given.", expected="A recipe, or --resume with a run, was expected."
            )
        if not isinstance(recipe, Recipe):
            recipe = load_recipe(recipe)
    with claimed_run(out) if is_first_process() else nullcontext():
        earlier = read_run_info(out) if resume else None
        if earlier is not None and earlier.status == "complete":  # while this process waited for the lock
            return open_run(out)
        return _train(
            recipe if isinstance(recipe, Recipe) else None,
            out,
            earlier,
            data_dir=data_dir,
            download=download,
            device=device,
            workers=workers,
            trust=trust,
            observer=observer,
            start=start,
        )


def _train(
    recipe: Recipe | None,
    out: Path,
    earlier: RunInfo | None,
    *,
    data_dir: Path | None,
    download: bool,
    device: str,
    workers: int | None,
    trust: str | None,
    observer: Observer | None,
    start: StartingPoint | None,
) -> Run:
    """`train`, into a folder that this process holds. earlier: of the run to go on with."""
    if earlier is not None:
        recipe = _recorded_recipe(earlier, out)
        if recipe.own_code:
            digest = sha256_file(out / RUN_FILE)
            kind = "factory" if models.is_factory(recipe.model) else "loss"
            trust_store.require(digest, f"the {kind} {' and '.join(recipe.own_code)} in {out}", trusted=trust)
    assert recipe is not None  # `train` saw to it
    if workers is not None:
        recipe = recipe_from_table(
            {**recipe.model_dump(mode="json"), "workers": workers}, source="with --workers"
        )
    if earlier is not None and _resumes_on(earlier.device, device):
        device = earlier.device
    with joined(_device_type(device)) as world, stop_signals(patient=world.size > 1) as stop:
        place = _device(_device_type(device), world)
        if place.index is not None:
            torch.cuda.set_device(place)
        with others_reachable():
            session = Session(recipe, out, data_dir, download, place, world, earlier, start)
        together = others_reachable(do=session.how_to_go_on()) if world.size > 1 else nullcontext()
        with cpu_settings(session.n_threads), together, workers_watched():
            return session.train(observer or SilentObserver(), stop)


def _recorded_recipe(info: RunInfo, out: Path) -> Recipe:
    """The recipe in a `run.json`. Raises ArtefactError when it is no recipe, or another network's."""
    file = out / RUN_FILE
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


def device_of(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device for one process.

    Raises MissingCapability when there is no CUDA device.
    """
    return _device(_device_type(name), ALONE)


def _device_type(name: str) -> str:
    """`cpu` or `cuda`. Raises MissingCapability when there is no CUDA device."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise MissingCapability(
            "torch sees no CUDA device.",
            expected="One was expected for --device cuda.",
            do="Use --device cpu, or see what `sparse-export doctor` finds.",
        )
    return name


def _device(kind: str, world: World) -> torch.device:
    """This process's device.

    Raises MissingCapability when there are fewer cards than processes on a machine.
    """
    if kind != "cuda" or world.size == 1:
        return torch.device(kind)
    if world.local_rank >= torch.cuda.device_count():
        raise MissingCapability(
            f"Process {world.local_rank} of this machine finds {torch.cuda.device_count()} CUDA devices.",
            expected="One device for each process was expected.",
            do="Start as many processes as there are devices: torchrun --nproc-per-node.",
        )
    return torch.device(kind, world.local_rank)


def _resumes_on(earlier: str, device: str) -> bool:
    """Does a resumed run stay on the device that it was started on? `auto` does where there is one."""
    return device == "auto" and (earlier == "cpu" or torch.cuda.is_available())
