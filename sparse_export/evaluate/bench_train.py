"""`bench-train`: a training step of a recipe, dense against sparse, in all its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from sparse_export import models
from sparse_export.errors import MissingCapability, UsageError
from sparse_export.evaluate.sessions import Timing
from sparse_export.evaluate.training_loop import Loop, StepBatch, fresh_network
from sparse_export.evaluate.training_step import Phases, StepBench, StepTimes
from sparse_export.evaluate.verdict import Verdict, verdict_of
from sparse_export.formats.run import ProductInfo
from sparse_export.instruments.conditions import measuring
from sparse_export.instruments.device import CudaStamps
from sparse_export.instruments.interleave import LatencyResult, check_measurable, measure_interleaved
from sparse_export.instruments.outcome import Outcome, outcome_of, require_possible_speedup
from sparse_export.instruments.statistics import Ratio, paired_ratio, resolution
from sparse_export.train.batches import batch_loader, has_own_parts
from sparse_export.train.distributed import World
from sparse_export.train.network import n_threads_for
from sparse_export.train.recipe import Recipe, load_recipe
from sparse_export.train.stopping import cpu_settings

__all__ = ["bench_training_step"]

_UPDATE_EVERY = 500  # where the recipe says once an epoch: SparseTraining's own default
_SIDES = ("dense", "dense again", "sparse")
_WINDOW = "window"  # the sparse network once more, in steps with dense gradients


def bench_training_step(
    recipe: Recipe | str | Path,
    *,
    rounds: int = 24,
    block_s: float = 0.1,
    warmup_limit_s: float = 10.0,
    device: str = "auto",
    batch_size: int | None = None,
    input_shape: Sequence[int] | None = None,
    update_every: int | None = None,
    n_threads: int | None = None,
    seed: int = 0,
    require_speedup: float | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> StepBench:
    """Time training steps of a recipe's network, its dense baseline, and that again, in interleaved blocks.

    Every step is forward, loss, backward, optimiser and masks on one batch that lies on the device: reading
    data is no part of it. Its inputs are random, but of a network with several inputs, or of one whose shape
    nothing else tells, samples of the recipe's own data with the loss of its task. The learning rate is 0,
    which costs the same and keeps numbers those of a fresh network. One mask update is timed by itself before
    each round, and its time spread over update_every steps.

    Args:
        recipe: a recipe, a shipped name or a TOML file; its precision, memory order, compilation and method
            count.
        device: `cpu`, `cuda` (times are then the device's own, by CUDA events) or `auto`.
        batch_size: in place of the recipe's.
        input_shape: of one sample, for a factory of one's own; where it is None, data of one's own tell it.
        update_every: in place of the recipe's; where that says once an epoch, 500.
        n_threads: of torch on the CPU; None for what training takes. With fewer than there are cores, threads
            are held to as many; those that torch started before are not.
        require_speedup: what the lower end of the ratio must reach; see `check_speedup`.

    Raises:
        RecipeError: a recipe that cannot be.
        UnknownNameError: no such recipe or network.
        UsageError: a dense recipe, or options without meaning.
        MissingCapability: no such device here.
    """
    check_measurable(rounds, block_s)
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    _check(loaded, batch_size, update_every, n_threads, require_speedup)
    loaded = _at_once(loaded)
    report = on_progress or (lambda line: None)
    place = _device(device)
    batch = batch_size or loaded.batch_size
    given = _batch(loaded, input_shape, batch, place, seed)
    every = update_every or loaded.sparsity.update_every or _UPDATE_EVERY
    threads = n_threads or loaded.threads or n_threads_for(fresh_network(loaded, given), batch)
    with (
        measuring(n_threads=threads, rounds=rounds, block_s=block_s, seed=seed) as conditions,
        cpu_settings(threads),
    ):
        loops, products = _loops(loaded, place, given, seed, every)
        sparse = loops["sparse"]
        report(f"{loaded.model}, batches of {batch} on {place.type}, {rounds} rounds")
        timing = Timing(batch=batch, rounds=rounds, block_s=block_s, seed=seed, warmup_limit_s=warmup_limit_s)
        times = _timed(loops, timing)
    shared = every if sparse.update_ms else None
    step_ms, phases = _over_an_interval(times, sparse, every)
    dense_ms = times["dense"].latency.samples_ms
    ratio = paired_ratio(dense_ms, step_ms)
    control = paired_ratio(dense_ms, times["dense again"].latency.samples_ms)
    verdict = _step_verdict(
        loaded,
        ratio=ratio,
        control=control,
        times=times,
        update_ms=sparse.update_ms,
        update_every=shared,
        device=place.type,
        products=products,
        phases=phases,
    )
    return StepBench(
        recipe=loaded.model_dump(mode="json"),
        model=loaded.model,
        input_shape=given.shape,
        inputs=_shapes_of(given),
        batch=batch,
        density=sparse.density,
        device=place.type,
        dense=times["dense"],
        dense_again=times["dense again"],
        sparse=times["sparse"],
        update_ms=tuple(sparse.update_ms),
        update_every=shared,
        ratio=ratio,
        control=control,
        floor=verdict.floor,
        outcome=verdict.outcome,
        verdict=verdict.text,
        required_speedup=require_speedup,
        products=products,
        phases=phases,
        **vars(conditions()),
    )


def _step_verdict(
    recipe: Recipe,
    *,
    ratio: Ratio,
    control: Ratio,
    times: Mapping[str, StepTimes],
    update_ms: Sequence[float],
    update_every: int | None,
    device: str,
    products: Sequence[ProductInfo],
    phases: Phases | None,
) -> Verdict:
    """The verdict on a step, with what its products let expect.

    Args:
        times: of every network.
        update_ms: of one update.
        update_every: steps that share one, None where masks do not move.
        device: its type.
    """
    outcome = outcome_of(ratio, resolution(control))
    parts: list[str] = []
    if phases is not None:
        parts.append(_of_phases(phases, products, update_every))
    else:
        parts += _of_products(products, outcome, device, transposable=recipe.sparsity.transposable)
    if update_every:
        parts.append(
            f"Masks cost {times['sparse'].part_ms['masks']:.3g} ms a step, and an update "
            f"{np.median(update_ms):.3g} ms once in {update_every} steps."
        )
    if recipe.cuda_graph:
        parts.append(
            "The recipe launches a step as one CUDA graph; these steps were launched kernel by kernel."
        )
    steady = all(one.latency.steady for one in times.values())
    return verdict_of(ratio, control, copies="two dense networks", steady=steady, why=parts)


def _of_phases(phases: Phases, products: Sequence[ProductInfo], update_every: int | None) -> str:
    n_csr = sum(product.by == "csr" for product in products)
    return (
        f"Of {len(products)} masked weights {n_csr} are multiplied without their inactive entries. Steps "
        f"that train active weights alone are {phases.between} as fast as dense ones, and those with dense "
        f"gradients, {phases.window_steps} of {update_every or 'none'}, {phases.within}."
    )


def _of_products(
    products: Sequence[ProductInfo], outcome: Outcome, device: str, *, transposable: bool
) -> list[str]:
    """Of steps of one kind: by which products they are made, and what that lets expect."""
    n_24 = sum(product.by == "2:4" for product in products)
    if n_24:
        backward = (
            "and those of their inputs' gradients, by masks that are 2:4 along both axes; gradients of "
            "weights are dense."
            if transposable
            else "both gradients are dense."
        )
        return [f"Forward products of {n_24} of {len(products)} masked weights are 2:4, {backward}"]
    if outcome == "speed-up":
        texts = ["The products are the same dense ones in both, so this does not come from skipped zeros."]
    else:
        why = "so sparsity takes no work away and masks add theirs"
        texts = [
            (
                f"Products are dense on this {device}: a masked weight is multiplied like any other, forward "
                f"and backward, {why}."
            )
        ]
    if products:
        reasons = "; ".join(f"{product.name}, {product.reason}" for product in products)
        texts.append(f"CSR products were asked for, and won for no layer: {reasons}.")
    return texts


def _at_once(recipe: Recipe) -> Recipe:
    """The recipe with its steps as they are once the cap of 2:4 products has come down."""
    if recipe.sparsity.products != "2:4" or recipe.sparsity.approach is None:
        return recipe
    return recipe.model_copy(update={"sparsity": replace(recipe.sparsity, approach=None)})


def _loops(
    recipe: Recipe, place: torch.device, batch: StepBatch, seed: int, every: int
) -> tuple[dict[str, Loop], tuple[ProductInfo, ...]]:
    """The networks to time by name, and what products were chosen for each masked weight of the sparse one.

    Where CSR products won somewhere there is one more, which stays in the window of dense gradients.
    """
    make = partial(Loop, recipe, device=place, batch=batch, seed=seed)
    loops = {name: make(sparse=name == "sparse") for name in _SIDES}
    sparse = loops["sparse"]
    products = sparse.choose() if recipe.sparsity.products == "csr" else sparse.by_24
    if any(product.by == "csr" for product in products):
        loops[_WINDOW] = make(sparse=True)
        for name in ("sparse", _WINDOW):
            loops[name].multiply_by(products, recipe.sparsity.window, every)
        sparse.narrow()
    return loops, products


def _timed(loops: dict[str, Loop], timing: Timing) -> dict[str, StepTimes]:
    stamps = loops["sparse"].stamps
    results = measure_interleaved(
        {name: loop.step for name, loop in loops.items()},
        **timing,
        before_round=_rounds_of(loops),
        time_calls=stamps.time_calls if isinstance(stamps, CudaStamps) else None,
    )
    return {name: _times(loop, results[name]) for name, loop in loops.items()}


def _rounds_of(loops: dict[str, Loop]) -> Callable[[], None]:
    """What goes before each round: an update, and before the first the warm-up is forgotten."""
    waiting = [loop.forget for loop in loops.values()]

    def begin() -> None:
        while waiting:
            waiting.pop()()
        loops["sparse"].update()

    return begin


def _times(loop: Loop, latency: LatencyResult) -> StepTimes:
    return StepTimes(
        latency=latency,
        steps_per_s=1e3 / latency.mean_ms,
        samples_per_s=1e3 * latency.batch / latency.mean_ms,
        part_ms=loop.part_ms(),
    )


def _over_an_interval(
    times: Mapping[str, StepTimes], sparse: Loop, every: int
) -> tuple[np.ndarray, Phases | None]:
    """Ms of a sparse step in each round, its share of an update and the window included, and both kinds of
    steps.
    """
    extra_ms = np.array(sparse.update_ms) / every if sparse.update_ms else 0.0
    dense_ms = times["dense"].latency.samples_ms
    narrow_ms = np.array(times["sparse"].latency.samples_ms)
    if _WINDOW not in times:
        return narrow_ms + extra_ms, None
    wide_ms = np.array(times[_WINDOW].latency.samples_ms)
    n_window = min(sparse.window_steps, every) if sparse.update_ms else 0
    share = n_window / every
    phases = Phases(
        window=times[_WINDOW],
        window_steps=n_window,
        mean_ms=_mixed(times["sparse"], times[_WINDOW], share) + float(np.mean(extra_ms)),
        between=paired_ratio(dense_ms, narrow_ms),
        within=paired_ratio(dense_ms, wide_ms),
    )
    return narrow_ms + (wide_ms - narrow_ms) * share + extra_ms, phases


def _mixed(narrow: StepTimes, wide: StepTimes, share: float) -> float:
    """Mean ms of a step of which a share is in the window."""
    return (1 - share) * narrow.latency.mean_ms + share * wide.latency.mean_ms


def _check(
    recipe: Recipe,
    batch_size: int | None,
    update_every: int | None,
    n_threads: int | None,
    require_speedup: float | None,
) -> None:
    if recipe.dense:
        raise UsageError(
            "The recipe is a dense one.",
            expected="One that trains sparse was expected; the dense network is timed beside it.",
            do="Leave dense out of the recipe.",
        )
    for name, value in (
        ("batch size", batch_size),
        ("update interval", update_every),
        ("number of threads", n_threads),
    ):
        if value is not None and value < 1:
            raise UsageError(f"The {name} is {value}.", expected="1 or more was expected.")
    require_possible_speedup(require_speedup, example="Write 1.05 for a step that is a twentieth faster.")


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"The device is {name!r}.", expected="cpu, cuda or auto was expected.")
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise MissingCapability(
            "torch sees no CUDA device.",
            expected="One was expected for the device cuda.",
            do="Time on the CPU, or see what `sparse-export doctor` finds.",
        )
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def _batch(recipe: Recipe, shape: Sequence[int] | None, n: int, device: torch.device, seed: int) -> StepBatch:
    """Random inputs, or the first samples of own data where nothing else tells what the network takes."""
    if shape is None and models.input_shape(recipe.model) is None and has_own_parts(recipe, None):
        loader = batch_loader(recipe, None, False, device, World())
        rows = torch.arange(n) % max(1, loader.info.n_train)
        inputs, targets = next(loader.training(rows, n, 0, 0))
        return StepBatch(inputs=inputs, targets=targets, is_drawn=False)
    torch.manual_seed(seed)
    return StepBatch(inputs=torch.randn((n, *_shape(recipe, shape)), device=device))


def _shapes_of(batch: StepBatch) -> dict[str, tuple[int, ...]]:
    """Of one sample, by the names of several inputs."""
    named = batch.inputs.items() if isinstance(batch.inputs, dict) else ()
    return {name: tuple(one.shape[1:]) for name, one in named}


def _shape(recipe: Recipe, given: Sequence[int] | None) -> tuple[int, ...]:
    known = models.input_shape(recipe.model)
    if given is not None:
        shape = tuple(given)
    elif known is not None:
        shape = known if recipe.image_size is None else (known[0], *recipe.image_size)
    else:
        raise UsageError(
            f"The shape of the inputs of {recipe.model} is not known.",
            expected="It was expected for a factory of one's own.",
            do="Give it by --input-shape, for example 3,32,32, or a recipe with data package.module:data.",
        )
    if not shape or min(shape) < 1:
        raise UsageError(f"The input shape is {shape}.", expected="Sizes of 1 or more were expected.")
    return shape
