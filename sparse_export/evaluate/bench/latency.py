"""Latency and throughput of one bundle, on each runtime and at several batch sizes."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from sparse_export.engines.loadable import engine_of
from sparse_export.engines.tensorrt_import import TARGETS
from sparse_export.errors import ArtefactError, MissingCapability, UnknownNameError, UsageError, what_and_do
from sparse_export.evaluate.bench.sessions import TimedSessions, Timing
from sparse_export.files import write_json
from sparse_export.formats.bundle import MODEL_FILE, Bundle, open_bundle
from sparse_export.instruments.conditions import Timed, how_timed, measuring
from sparse_export.instruments.interleave import LatencyResult, check_measurable
from sparse_export.instruments.machine import n_usable_cores
from sparse_export.instruments.statistics import Location, Ratio, location, paired_ratio, resolution
from sparse_export.runtimes.choice import RUNTIMES, candidates, open_runtime, runtime_note
from sparse_export.trust import Given

__all__ = ["Bench", "BenchRow", "NotTimed", "bench", "check_batches", "write_bench"]

RESULT_FILE = "bench.json"
_WIDTH = 98


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One runtime at one batch size; every call is of `batch` samples and ends with the logits in host memory.

    runtime: as the session names itself.  file: of the bundle, that it ran.  latency: the timed session.  latency_ms: of an undisturbed call, with its 95 % interval over rounds.
    samples_per_s: batch / mean time of all calls, disturbed ones included; calls follow one another.
    device, device_ms: the same of the work on the device alone, by CUDA events, the input lying there already; None
    where the runtime cannot say.
    control: that session / another one of the same file, which differs from 1 only by what cannot be resolved here;
    floor: the farthest end of its interval from 1.
    """

    runtime: str
    file: str
    batch: int
    latency: LatencyResult
    again: LatencyResult
    latency_ms: Location
    samples_per_s: float
    control: Ratio
    floor: float
    device: LatencyResult | None = None
    device_ms: Location | None = None


@dataclass(frozen=True, kw_only=True)
class NotTimed:
    """A runtime, or one batch size of it, that was to be timed and could not be. why: in words."""

    runtime: str
    batch: int | None
    why: str


@dataclass(frozen=True, kw_only=True)
class Bench(Timed):
    """Everything that `bench` measured; `str()` gives the table for people.

    size_bytes: of model.onnx.  cuda_graphs: engines replayed their launches.  cores: that the threads were held to, () for every usable one.  cards: what NVML said
    meanwhile.
    """

    path: str
    model: str | None
    method: str
    density: float
    precision: str
    size_bytes: int
    rows: tuple[BenchRow, ...]
    not_timed: tuple[NotTimed, ...]
    cuda_graphs: bool = False

    def __str__(self) -> str:
        return _table(self)


def bench(
    bundle: Bundle | Path,
    *,
    batches: Sequence[int] = (1, 8, 32, 128),
    runtimes: Sequence[str] = (),
    rounds: int = 24,
    block_s: float = 0.02,
    warmup_limit_s: float = 5.0,
    n_threads: int | None = None,
    seed: int = 0,
    trust: Given = None,
    cuda_graphs: bool = False,
    on_progress: Callable[[str], None] | None = None,
) -> Bench:
    """Time a bundle on standard normal inputs of several batch sizes, on each runtime by itself.

    Where the runtime is one of engines, the bundle's engine is loaded, else model.onnx, whose packed weights are
    expanded in memory. That is done twice, and both sessions are timed in interleaved blocks, being loaded anew in
    random order before each round, as `compare` does it; the second one is the control.

    runtimes: names in RUNTIMES; none for all `candidates`, of which those that do not work are told of in
    `not_timed`, with the reason. So is a batch that an engine has no profile for.  n_threads: None for the cores that
    this process may use; with fewer, the threads are held to as many cores, one of each physical core first.
    rounds, block_s, warmup_limit_s: see `measure_interleaved`.  seed: of the inputs and the order.  trust: SHA-256 of
    the manifest, needed once for engines of a bundle from elsewhere.  cuda_graphs: engines replay their launches.
    Raises UnknownNameError, UsageError (options without meaning, or no batch that fits), MissingCapability (a runtime
    that was named cannot run here, or none can), NotTrustedError or ArtefactError.
    """
    check_batches(batches)
    check_measurable(rounds, block_s)
    _check_runtimes(runtimes)
    bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    chosen = tuple(runtimes) or candidates(bundle)
    if cuda_graphs:
        _require_replayed(chosen)
    tell = on_progress or (lambda line: None)
    threads = n_usable_cores() if n_threads is None else n_threads
    timings = [
        Timing(batch=batch, rounds=rounds, block_s=block_s, seed=seed, warmup_limit_s=warmup_limit_s)
        for batch in batches
    ]
    rows: list[BenchRow] = []
    not_timed: list[NotTimed] = []
    broken = False  # that the last one, which runs everywhere, could not run is the fault of the file
    with measuring(n_threads=threads, rounds=rounds, block_s=block_s, seed=seed) as conditions:
        for name in chosen:
            opener = partial(
                open_runtime, bundle, name, n_threads=threads, trust=trust, cuda_graphs=cuda_graphs
            )
            with contextlib.ExitStack() as stack:
                try:
                    sessions = stack.enter_context(TimedSessions({"first": opener, "again": opener}, seed))
                except (MissingCapability, ArtefactError) as cause:
                    if runtimes:
                        raise
                    not_timed.append(_told(NotTimed(runtime=name, batch=None, why=what_and_do(cause)), tell))
                    broken = isinstance(cause, ArtefactError)
                    continue
                note = runtime_note(bundle, name)
                if note is not None:
                    tell(note)
                for timing in timings:
                    found = _row(sessions, bundle, name, timing, tell)
                    if isinstance(found, NotTimed):
                        not_timed.append(found)
                    else:
                        rows.append(found)
    _require_some(bundle, rows, not_timed, broken=broken)
    return Bench(
        path=str(bundle.path),
        model=bundle.info.model.name,
        method=bundle.info.method,
        density=bundle.info.density,
        precision=bundle.info.precision,
        size_bytes=bundle.info.files[MODEL_FILE].size_bytes,
        rows=tuple(rows),
        not_timed=tuple(not_timed),
        cuda_graphs=cuda_graphs,
        **conditions,
    )


def write_bench(folder: Path, result: Bench) -> Path:
    """Write `bench.json`, raw samples included, into the folder; return its path. Raises OutputError."""
    path = Path(folder) / RESULT_FILE
    write_json(path, {"kind": "bench", **asdict(result)})
    return path


def check_batches(batches: Sequence[int]) -> None:
    """Raise UsageError unless these are different numbers of at least 1."""
    if not batches or min(batches) < 1 or len(set(batches)) != len(batches):
        raise UsageError(
            f"The batch sizes are {tuple(batches)}.",
            expected="Different numbers of at least 1 were expected.",
        )


def _check_runtimes(runtimes: Sequence[str]) -> None:
    for name in runtimes:
        if name not in RUNTIMES:
            raise UnknownNameError("runtime", name, RUNTIMES)
    if len(set(runtimes)) != len(runtimes):
        raise UsageError(f"The runtimes are {', '.join(runtimes)}.", expected="Each was expected once.")


def _require_replayed(runtimes: Sequence[str]) -> None:
    """Raise UsageError where none of the runtimes replays CUDA graphs."""
    if not set(runtimes) & set(TARGETS):
        raise UsageError(
            f"CUDA graphs were asked for, and {', '.join(runtimes)} replay none.",
            expected=f"They were expected to go with {' or '.join(TARGETS)}.",
            do="Leave --cuda-graphs out, or time a bundle with an engine.",
        )


def _told(one: NotTimed, tell: Callable[[str], None]) -> NotTimed:
    tell(f"{one.runtime}{_at(one.batch)} is not timed: {one.why}")
    return one


def _why_not(sessions: TimedSessions, bundle: Bundle, batch: int) -> str | None:
    """Why a batch cannot be run, None when it can."""
    x = np.zeros((batch, *bundle.info.model.input_shape), dtype=np.float32)
    try:
        sessions.run("first", x)
    except UsageError as cause:
        return f"{cause.what} {cause.expected}"
    return None


def _require_some(
    bundle: Bundle, rows: Sequence[BenchRow], not_timed: Sequence[NotTimed], *, broken: bool
) -> None:
    if rows:
        return
    told = "; ".join(f"{one.runtime}{_at(one.batch)}: {one.why}" for one in not_timed)
    if broken:
        raise ArtefactError(
            f"Nothing can run {bundle.path}: {told}",
            expected="A model.onnx that onnxruntime runs on the CPU was expected.",
        )
    if all(one.batch is None for one in not_timed):
        raise MissingCapability(
            f"Nothing here can run {bundle.path}: {told}",
            expected="One runtime at least was expected.",
            do="Run `sparse-export doctor`.",
        )
    raise UsageError(
        f"No batch of {bundle.path} could be timed: {told}",
        expected="A batch that the engine has a profile for was expected.",
        do="Ask for another --batch, or build with another --profile.",
    )


def _at(batch: int | None) -> str:
    return "" if batch is None else f" at batch {batch}"


def _row(
    sessions: TimedSessions, bundle: Bundle, runtime: str, timing: Timing, tell: Callable[[str], None]
) -> BenchRow | NotTimed:
    shape, batch = bundle.info.model.input_shape, timing["batch"]
    why = _why_not(sessions, bundle, batch)
    if why is not None:
        return _told(NotTimed(runtime=runtime, batch=batch, why=why), tell)
    tell(f"{runtime} at batch {batch}, {timing['rounds']} rounds")
    results = sessions.measure(shape, **timing)
    device = sessions.measure_on_device(shape, **timing).get("first")
    first, again = results["first"], results["again"]
    control = paired_ratio(first.samples_ms, again.samples_ms)
    found = sessions.open["first"].name
    return BenchRow(
        runtime=found,
        file=engine_of(bundle, runtime).file if runtime in TARGETS else MODEL_FILE,
        batch=batch,
        latency=first,
        again=again,
        latency_ms=location(first.samples_ms),
        samples_per_s=1e3 * batch / first.mean_ms,
        control=control,
        floor=resolution(control),
        device=device,
        device_ms=None if device is None else location(device.samples_ms),
    )


def _table(result: Bench) -> str:
    what = result.model or "a network of your own"
    head = f"{result.path}: {what}, {result.method}, density {result.density:.4g}, {result.precision}"
    width = max(18, *(len(row.runtime) + 2 for row in result.rows))
    titles = f"{'runtime':<{width}}{'batch':>6}{'p50 ms':>10}{'p90 ms':>10}{'p99 ms':>10}{'calls':>9}{'samples/s':>12}"
    lines = [
        f"{head}, model.onnx {result.size_bytes:,} bytes",
        "",
        f"{titles}   {'undisturbed ms [95 %]':<26}{'floor':>6}",
    ]
    for row in result.rows:
        at, ms = row.latency, row.latency_ms
        lines.append(
            f"{row.runtime:<{width}}{row.batch:>6}{at.median_ms:>10.4g}{at.p90_ms:>10.4g}"
            f"{'-' if at.p99_ms is None else format(at.p99_ms, '.4g'):>10}{at.n_calls:>9,}"
            f"{row.samples_per_s:>12,.0f}   {f'{ms.estimate:.4g} [{ms.low:.4g}, {ms.high:.4g}]':<26}"
            f"{100 * (row.floor - 1):>4.1f} %{'' if at.steady and row.again.steady else '  not steady'}"
        )
    lines.append("")
    for note in _notes(result):
        lines += textwrap.wrap(note, _WIDTH)
    return "\n".join(lines)


def _notes(result: Bench) -> list[str]:
    """What is to be said below the figures, a paragraph each."""
    explained = (
        "floor: by how much two copies of this very file differ here; smaller differences mean nothing. A 99th "
        "percentile is given from 1,000 calls on."
    )
    notes = [explained]
    for row in result.rows:
        if row.device_ms is not None:
            ms = row.device_ms
            notes.append(
                f"{row.runtime} at batch {row.batch}: {ms.estimate:.4g} ms [{ms.low:.4g}, {ms.high:.4g}] on the device alone, "
                "by CUDA events, without copies to and from the host."
            )
    if result.cuda_graphs:
        notes.append("Engines replayed CUDA graphs.")
    if any(not row.latency.steady for row in result.rows):
        notes.append("not steady: times had not settled when warm-up ended; repeat on a quiet machine.")
    if result.cards.throttled:
        notes.append(f"The card's clock was held down meanwhile: {', '.join(result.cards.throttled)}.")
    notes += [f"Not timed: {one.runtime}{_at(one.batch)}: {one.why}" for one in result.not_timed]
    engines = dict.fromkeys((row.runtime, row.file) for row in result.rows if row.file.startswith("engines/"))
    notes += [f"{runtime} ran {file}." for runtime, file in engines]
    return [*notes, _conditions(result)]


def _conditions(result: Bench) -> str:
    machine = result.machine
    version = next((v for k, v in result.versions.items() if k.startswith("onnxruntime")), "")
    load = machine["load_average"]
    where = [machine["cpu_model"] or "unknown CPU", f"{machine['n_cores_usable']} cores"]
    where += [gpu["name"] for gpu in machine["gpus"]]
    where += [f"load {load[0]}"] if load else []
    return f"onnxruntime {version}, {how_timed(result)}; {', '.join(where)}."
