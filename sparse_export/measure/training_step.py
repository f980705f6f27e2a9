"""A training step of a recipe, dense against sparse, in all its parts."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparse_export import models
from sparse_export.artefact import ProductFact, library_versions, now
from sparse_export.errors import MissingCapability, SpeedupNotReached, UsageError
from sparse_export.files import write_json
from sparse_export.measure.card import CardLog, watched_cards
from sparse_export.measure.device import CudaStamps, stamps_for
from sparse_export.measure.interleave import LatencyResult, check_measurable, measure_interleaved
from sparse_export.measure.machine import machine_facts
from sparse_export.measure.pinning import pinned
from sparse_export.measure.statistics import Ratio, paired_ratio, resolution
from sparse_export.models.lazy import give_shapes
from sparse_export.train.csr_choice import choose_products
from sparse_export.train.layers import output_layers
from sparse_export.train.making import make_sparsifier
from sparse_export.train.network import n_threads_for
from sparse_export.train.optimizer import make_optimizer
from sparse_export.train.recipe import Recipe, load_recipe
from sparse_export.train.sparse_training import SparseTraining
from sparse_export.train.sparsifier import Sparsifier
from sparse_export.train.step24 import Step24, product_facts, products_24
from sparse_export.train.step_csr import StepCsr
from sparse_export.train.stopping import cpu_settings

__all__ = ["PARTS", "StepBench", "StepTimes", "bench_training_step", "check_speedup", "write_step_bench"]

PARTS = ("forward", "backward", "optimizer", "masks")
RESULT_FILE = "bench-train.json"
_WIDTH = 98
_UPDATE_EVERY = 500  # where the recipe says once an epoch: SparseTraining's own default
_TOTAL_STEPS = 10**9  # so long a training that prune rates stay where they start
_SIDES = ("dense", "dense again", "sparse")
_WINDOW = "window"  # the sparse network once more, in steps with dense gradients


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """One network's steps. samples_per_s: batch / mean time.

    part_ms: mean ms of each of PARTS over all timed steps, which add up where medians do not: forward with the loss, backward, the optimiser with its
    zeroing of gradients, and whatever keeps the network sparse, mask updates left out.
    """

    latency: LatencyResult
    steps_per_s: float
    samples_per_s: float
    part_ms: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Phases:
    """The two kinds of steps that training with CSR products has, see `sparse_export.train.step_csr.StepCsr`.

    window: steps with dense gradients before an update, window_steps of them in update_every; all others train active
    weights alone.  mean_ms: of a step over a whole update interval, the update and the changes between the two kinds
    included.  between, within: dense / sparse for steps outside and inside the window, without any share of an update.
    """

    window: StepTimes
    window_steps: int
    mean_ms: float
    between: Ratio
    within: Ratio


@dataclass(frozen=True, kw_only=True)
class StepBench:
    """Everything that `bench-train` measured; `str()` gives the table for people.

    update_ms: one mask update a round; update_every: steps that share one.  ratio: dense / sparse, each sparse step
    with its share of an update, and of dense windows where there are any, above 1 when sparse is faster.
    products, phases: where the recipe asks for CSR products, what was chosen for each masked weight, and the kinds of
    steps; no phases where dense products were chosen for all. `sparse` is then a step outside the window.
    control: dense / another dense network.
    floor, outcome, verdict: as in `comparison.LatencyComparison`.
    """

    recipe: dict[str, Any]
    model: str
    input_shape: tuple[int, ...]
    batch: int
    density: float
    device: str
    dense: StepTimes
    dense_again: StepTimes
    sparse: StepTimes
    update_ms: tuple[float, ...]
    update_every: int | None
    ratio: Ratio
    control: Ratio
    floor: float
    outcome: str
    verdict: str
    required_speedup: float | None
    n_threads: int
    cores: tuple[int, ...]
    rounds: int
    block_s: float
    seed: int
    machine: dict[str, Any]
    cards: CardLog
    versions: dict[str, str]
    created: str
    products: tuple[ProductFact, ...] = ()
    phases: Phases | None = None

    def __str__(self) -> str:
        return _table(self)


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
    """Time training steps of a recipe's network, its dense twin, and the twin again, in interleaved blocks.

    Every step is forward, loss, backward, optimiser and masks on one batch of random inputs that lies on the device:
    reading data is no part of it. The learning rate is 0, which costs the same and keeps numbers those of a fresh
    network. One mask update is timed by itself before each round, and its time spread over update_every steps.

    recipe: a recipe, a shipped name or a TOML file; its precision, memory order, compilation and method count.
    device: `cpu`, `cuda` (times are then the device's own, by CUDA events) or `auto`.  batch_size: in place of the
    recipe's.  input_shape: of one sample, needed for a factory of one's own.
    update_every: in place of the recipe's; where that says once an epoch, 500.
    n_threads: of torch on the CPU; None for what training takes. With fewer than there are cores, threads are held to
    as many; those that torch started before are not.
    require_speedup: what the lower end of the ratio must reach; see `check_speedup`.
    Raises RecipeError, UnknownNameError, UsageError (a dense recipe, options without meaning) or MissingCapability.
    """
    check_measurable(rounds, block_s)
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    _check(loaded, batch_size, update_every, n_threads, require_speedup)
    if loaded.sparsity.products == "2:4":  # as the steps are when the cap has come down
        at_once = loaded.sparsity.model_copy(update={"approach": (0.0, 0.0)})
        loaded = loaded.model_copy(update={"sparsity": at_once})
    tell = on_progress or (lambda line: None)
    place = _device(device)
    shape = _shape(loaded, input_shape)
    batch = batch_size or loaded.batch_size
    threads = n_threads or loaded.threads or n_threads_for(_network(loaded, shape), batch)
    machine = machine_facts()
    with watched_cards() as cards, pinned(threads) as cores, cpu_settings(threads):
        loops = {name: _Loop(loaded, name == "sparse", place, batch, shape, seed) for name in _SIDES}
        sparse = loops["sparse"]
        every = update_every or loaded.sparsity.update_every or _UPDATE_EVERY
        products = sparse.choose() if loaded.sparsity.products == "csr" else sparse.by_24
        if any(fact.by == "csr" for fact in products):
            loops[_WINDOW] = _Loop(loaded, True, place, batch, shape, seed)
            for name in ("sparse", _WINDOW):
                loops[name].multiply_by(products, loaded.sparsity.window, every)
            sparse.narrow()
        tell(f"{loaded.model}, batches of {batch} on {place.type}, {rounds} rounds")
        results = measure_interleaved(
            {name: loop.step for name, loop in loops.items()},
            batch=batch,
            rounds=rounds,
            block_s=block_s,
            seed=seed,
            warmup_limit_s=warmup_limit_s,
            before_round=_rounds_of(loops),
            time_calls=sparse.stamps.time_calls if isinstance(sparse.stamps, CudaStamps) else None,
        )
        times = {name: _times(loop, results[name]) for name, loop in loops.items()}
    shared = every if sparse.update_ms else None
    extra_ms = np.array(sparse.update_ms) / shared if shared else 0.0
    dense = results["dense"].samples_ms
    step_ms = np.array(results["sparse"].samples_ms)
    phases = None
    if _WINDOW in times:
        n_window = min(sparse.window_steps, every) if sparse.update_ms else 0
        wide_ms = results[_WINDOW].samples_ms
        between, within = paired_ratio(dense, step_ms), paired_ratio(dense, wide_ms)
        step_ms = step_ms + (np.array(wide_ms) - step_ms) * (n_window / every)
        mean_ms = _mixed(times["sparse"], times[_WINDOW], n_window / every) + float(np.mean(extra_ms))
        phases = Phases(
            window=times[_WINDOW], window_steps=n_window, mean_ms=mean_ms, between=between, within=within
        )
    ratio = paired_ratio(dense, step_ms + extra_ms)
    control = paired_ratio(dense, results["dense again"].samples_ms)
    outcome, verdict = _judge(
        ratio,
        control,
        times,
        sparse.update_ms,
        shared,
        place,
        products,
        phases,
        transposable=loaded.sparsity.transposable,
    )
    if loaded.cuda_graph:
        verdict += (
            " The recipe launches a step as one CUDA graph; these steps were launched kernel by kernel."
        )
    return StepBench(
        recipe=loaded.model_dump(mode="json"),
        model=loaded.model,
        input_shape=shape,
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
        floor=resolution(control),
        outcome=outcome,
        verdict=verdict,
        required_speedup=require_speedup,
        n_threads=threads,
        cores=cores,
        rounds=rounds,
        block_s=block_s,
        seed=seed,
        machine=machine,
        cards=cards,
        versions=library_versions(),
        created=now(),
        products=products,
        phases=phases,
    )


def check_speedup(result: StepBench) -> None:
    """Raise SpeedupNotReached when a speed-up was required and not measured."""
    wanted = result.required_speedup
    if wanted is not None and (result.outcome != "speed-up" or result.ratio.low < wanted):
        raise SpeedupNotReached(
            f"The training step's speed-up is {_ratio(result.ratio)}.",
            expected=f"At least {wanted:g}x was required, at the lower end of the interval.",
            do="Read the verdict: masks alone do not make a step shorter.",
        )


def write_step_bench(folder: Path, result: StepBench) -> Path:
    """Write `bench-train.json`, raw samples included, into the folder; return its path. Raises OutputError."""
    path = Path(folder) / RESULT_FILE
    write_json(path, {"kind": "bench-train", **asdict(result)})
    return path


def _network(recipe: Recipe, shape: tuple[int, ...]) -> nn.Module:
    """The recipe's network with fresh weights, for samples of a shape."""
    network = models.create(recipe.model)
    give_shapes(network, shape)
    return network


class _Loop:
    """One network in training, and the times of the parts of its steps."""

    def __init__(
        self,
        recipe: Recipe,
        sparse: bool,
        device: torch.device,
        batch: int,
        shape: tuple[int, ...],
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        self.stamps = stamps_for(device.type)
        self.update_ms: list[float] = []
        self._marks: list[tuple[Any, ...]] = []
        self._inside: list[Any] = []
        self._recipe, self._device = recipe, device
        layout = torch.channels_last if recipe.channels_last and len(shape) == 3 else torch.contiguous_format
        self._x = torch.randn((batch, *shape), device=device).contiguous(memory_format=layout)
        model = _network(recipe, shape).to(device)
        if recipe.channels_last:
            model = model.to(memory_format=torch.channels_last)
        model.eval()
        outputs: list[Tensor] = []
        with torch.no_grad():
            last = output_layers(model, lambda: outputs.append(model(self._x[:2])))
        self._y = torch.randint(outputs[0].shape[-1], (batch,), device=device)
        model.train()
        self._optimizer = make_optimizer(recipe.optimizer, model)
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0
        self._sparse: Sparsifier | None = None
        self._products: StepCsr | None = None
        if sparse:
            self._sparse = make_sparsifier(recipe, model, self._optimizer, _TOTAL_STEPS, output_layers=last)
        if isinstance(self._sparse, SparseTraining):
            self._sparse.update_every = None  # updates are timed apart
        self._model = model
        self._products_24: Step24 | None = None
        if isinstance(self._sparse, SparseTraining) and recipe.sparsity.products == "2:4":
            self._products_24 = products_24(
                model, self._sparse, self._x, sparse_backward=recipe.sparsity.transposable
            )
        self._optimizer.register_step_pre_hook(lambda *_: self._inside.append(self.stamps.now()))
        self._optimizer.register_step_post_hook(lambda *_: self._inside.append(self.stamps.now()))
        compiled: Any = torch.compile(model) if recipe.compile else model
        self._forward: Callable[[Tensor], Tensor] = compiled

    @property
    def density(self) -> float:
        return self._sparse.density_now if self._sparse else 1.0

    def step(self) -> None:
        now = self.stamps.now
        self._inside.clear()
        begin = now()
        self._optimizer.zero_grad()
        zeroed = now()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._recipe.precision == "bf16"):
            loss = nn.functional.cross_entropy(
                self._forward(self._x), self._y, label_smoothing=self._recipe.label_smoothing
            )
        lost = now()
        loss.backward()
        back = now()
        if self._sparse is None:
            self._optimizer.step()
        else:
            self._sparse.step()
        if self._products_24 is not None:
            self._products_24.after_step()
        self._marks.append((begin, zeroed, lost, back, *self._inside, now()))

    @property
    def by_24(self) -> tuple[ProductFact, ...]:
        """The masked weights, by 2:4 products or why not; none where the recipe does not ask for them."""
        if self._products_24 is None or not isinstance(self._sparse, SparseTraining):
            return ()
        return product_facts(self._products_24, self._sparse.masks)

    def forget(self) -> None:
        """Drop the marks of the warm-up."""
        self._marks.clear()

    def choose(self) -> tuple[ProductFact, ...]:
        """What products win for each masked weight, timed as training does at its start."""
        assert isinstance(self._sparse, SparseTraining)
        return choose_products(self._model, self._sparse.masks, self._x)

    def multiply_by(self, products: Sequence[ProductFact], window: int | None, every: int) -> None:
        """Take the chosen products, with whole weights in training."""
        assert isinstance(self._sparse, SparseTraining)
        layers = [fact.name for fact in products if fact.by == "csr"]
        self._products = StepCsr(self._model, self._sparse, layers=layers, window=window, update_every=every)
        self._products.widen()

    def narrow(self) -> None:
        """Train active weights alone from now on."""
        assert self._products is not None
        self._products.narrow()

    @property
    def window_steps(self) -> int:
        return self._products.window if self._products else 0

    def update(self) -> None:
        """Update the masks, timed by the host, where this method lets them be updated from outside.

        Where active weights are trained alone: from there and back again, which is all that an interval changes. Where
        products are 2:4: with the compression of the new patterns.
        """
        if isinstance(self._sparse, SparseTraining) and self._sparse.rule.moves:
            self.stamps.wait()
            watch = stamps_for("cpu")
            begin = watch.now()
            self._sparse.update()
            if self._products is not None:
                self._products.after_step()
                self._products.narrow()
            if self._products_24 is not None:
                self._products_24.after_step()  # compresses the new patterns
            self.stamps.wait()
            self.update_ms.append(1e3 * watch.seconds(begin, watch.now()))

    def part_ms(self) -> dict[str, float]:
        """Mean ms of each part. A step's marks: begin, gradients zeroed, loss, backward, optimiser in and out, end."""
        self.stamps.wait()
        gaps = np.array([[self.stamps.seconds(a, b) for a, b in pairwise(marks)] for marks in self._marks])
        zero, forward, backward, before, optimizer, after = 1e3 * gaps.T
        parts = (forward, backward, zero + optimizer, before + after)
        return {name: float(values.mean()) for name, values in zip(PARTS, parts, strict=True)}


def _rounds_of(loops: dict[str, _Loop]) -> Callable[[], None]:
    """What goes before each round: an update, and before the first the warm-up is forgotten."""
    waiting = [loop.forget for loop in loops.values()]

    def begin() -> None:
        while waiting:
            waiting.pop()()
        loops["sparse"].update()

    return begin


def _times(loop: _Loop, latency: LatencyResult) -> StepTimes:
    return StepTimes(
        latency=latency,
        steps_per_s=1e3 / latency.mean_ms,
        samples_per_s=1e3 * latency.batch / latency.mean_ms,
        part_ms=loop.part_ms(),
    )


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
            expected="One that trains sparse was expected; its dense twin is timed beside it.",
            do="Leave dense out of the recipe.",
        )
    for name, value in (
        ("batch size", batch_size),
        ("update interval", update_every),
        ("number of threads", n_threads),
    ):
        if value is not None and value < 1:
            raise UsageError(f"The {name} is {value}.", expected="1 or more was expected.")
    if require_speedup is not None and not 1 <= require_speedup < float("inf"):
        raise UsageError(
            f"The required speed-up is {require_speedup}.",
            expected="A finite ratio of at least 1 was expected.",
            do="Write 1.05 for a step that is a twentieth faster.",
        )


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
            do="Give it by --input-shape, for example 3,32,32.",
        )
    if not shape or min(shape) < 1:
        raise UsageError(f"The input shape is {shape}.", expected="Sizes of 1 or more were expected.")
    return shape


def _judge(
    ratio: Ratio,
    control: Ratio,
    times: dict[str, StepTimes],
    update_ms: Sequence[float],
    update_every: int | None,
    device: torch.device,
    products: Sequence[ProductFact],
    phases: Phases | None,
    *,
    transposable: bool = False,
) -> tuple[str, str]:
    """The outcome, and the sentences that say it and why."""
    floor = resolution(control)
    outcome = "no difference"
    if ratio.low > floor:
        outcome = "speed-up"
    elif ratio.high < 1 / floor:
        outcome = "slow-down"
    differ = f"two dense networks differ here by up to {100 * (floor - 1):.1f} %"
    parts = [f"{outcome.capitalize()}: dense / sparse is {_ratio(ratio)}, and {differ}."]
    sparse = times["sparse"]
    by_24 = [fact.name for fact in products if fact.by == "2:4"]
    if phases is not None:
        by_csr = [fact.name for fact in products if fact.by == "csr"]
        parts.append(
            f"Of {len(products)} masked weights {len(by_csr)} are multiplied without their inactive entries. Steps that "
            f"train active weights alone are {_ratio(phases.between)} as fast as dense ones, and those with dense "
            f"gradients, {phases.window_steps} of {update_every or 'none'}, {_ratio(phases.within)}."
        )
    elif by_24:
        parts.append(
            f"Forward products of {len(by_24)} of {len(products)} masked weights are 2:4, "
            + (
                "and those of their inputs' gradients, by masks that are 2:4 along both axes; gradients of weights are dense."
                if transposable
                else "both gradients are dense."
            )
        )
    elif outcome != "speed-up":
        parts.append(
            f"Products are dense on this {device.type}: a masked weight is multiplied like any other, forward and "
            "backward, so sparsity takes no work away and masks add theirs."
        )
    else:
        parts.append(
            "The products are the same dense ones in both, so this does not come from skipped zeros."
        )
    if products and phases is None and not by_24:
        parts.append("CSR products were asked for, and won for no layer: " + _reasons(products) + ".")
    if update_every:
        parts.append(
            f"Masks cost {sparse.part_ms['masks']:.3g} ms a step, and an update {np.median(update_ms):.3g} ms once in "
            f"{update_every} steps."
        )
    if not control.low <= 1.0 <= control.high:
        parts.append("The control itself misses 1: smaller differences than its own mean nothing here.")
    if not all(one.latency.steady for one in times.values()):
        parts.append("Times had not become steady when warm-up ended; repeat on a quiet machine.")
    return outcome, " ".join(parts)


def _reasons(products: Sequence[ProductFact]) -> str:
    return "; ".join(f"{fact.name}, {fact.reason}" for fact in products)


def _table(result: StepBench) -> str:
    dense, sparse = result.dense, result.sparse
    rows: list[tuple[str, float, float, str]] = [
        ("steps/s", dense.steps_per_s, sparse.steps_per_s, ""),
        ("samples/s", dense.samples_per_s, sparse.samples_per_s, ""),
        (
            "median ms a step",
            dense.latency.median_ms,
            sparse.latency.median_ms,
            f"{_ratio(result.ratio)} as fast",
        ),
        ("mean ms a step", dense.latency.mean_ms, sparse.latency.mean_ms, ""),
        *((f"  {name}", dense.part_ms[name], sparse.part_ms[name], "") for name in PARTS),
        ("90th percentile ms", dense.latency.p90_ms, sparse.latency.p90_ms, ""),
    ]
    if result.phases is not None:
        phases = result.phases
        rows.append(
            (
                "in the window, mean ms",
                dense.latency.mean_ms,
                phases.window.latency.mean_ms,
                f"{phases.window_steps} steps",
            )
        )
        rows.append(
            ("all in all, mean ms", dense.latency.mean_ms, phases.mean_ms, "with its share of an update")
        )
    again = result.dense_again.latency.median_ms
    rows.append(
        ("control: dense twice", dense.latency.median_ms, again, f"{_ratio(result.control)} should hold 1")
    )
    lines = [
        f"{result.model}, batches of {result.batch} of {result.input_shape}, density {result.density:.4g}, "
        + f"{result.recipe['precision']}{', compiled' if result.recipe['compile'] else ''}, on {result.device}",
        "",
        f"{'':<24}{'dense':>12}{'sparse':>12}",
    ]
    lines += [f"{a:<24}{b:>12.4g}{c:>12.4g}   {d}".rstrip() for a, b, c, d in rows]
    lines += [""] + [f"{fact.name} by {fact.by}: {fact.reason}" for fact in result.products]
    lines += [""] if result.products else []
    where = [str(gpu["name"]) for gpu in result.machine["gpus"]] if result.device == "cuda" else []
    load = result.machine["load_average"]
    held = f" on core {', '.join(map(str, result.cores))}" if result.cores else ""
    conditions = (
        f"torch {result.versions['torch']}, threads: {result.n_threads}{held}, {result.rounds} interleaved rounds of "
        f"blocks of {1e3 * result.block_s:g} ms, seed {result.seed}, random inputs, learning rate 0, 95 % intervals; "
        + ", ".join(
            [*where, result.machine["cpu_model"] or "unknown CPU", f"load {load[0] if load else '?'}"]
        )
    )
    for note in (result.verdict, "", conditions + "."):
        lines += textwrap.wrap(note, _WIDTH, subsequent_indent="  ") if note else [""]
    return "\n".join(lines)


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.estimate:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
