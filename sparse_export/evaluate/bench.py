"""`bench`: latency and throughput of one bundle, on each runtime and at several batch sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from sparse_export.engines.loadable import engine_of
from sparse_export.engines.tensorrt_import import TARGETS
from sparse_export.errors import ArtefactError, MissingCapability, UnknownNameError, UsageError, what_and_do
from sparse_export.evaluate.latency import Bench, BenchRow, NotTimed, at_batch
from sparse_export.evaluate.sessions import (
    TimedSessions,
    Timing,
    require_cuda_graphs,
    timed_inputs,
    timed_sizes,
)
from sparse_export.formats.bundle import MODEL_FILE, Bundle, open_bundle
from sparse_export.instruments.conditions import measuring
from sparse_export.instruments.interleave import check_measurable
from sparse_export.instruments.machine import n_usable_cores
from sparse_export.instruments.statistics import location, paired_ratio, resolution
from sparse_export.runtimes.choice import RUNTIMES, candidates, open_runtime, runtime_note
from sparse_export.trust import TrustedDigests

__all__ = ["bench", "check_batches"]


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
    trust: TrustedDigests = None,
    cuda_graphs: bool = False,
    on_progress: Callable[[str], None] | None = None,
) -> Bench:
    """Time a bundle on standard normal inputs of several batch sizes, on each runtime by itself.

    Where the runtime is one of engines, the bundle's engine is loaded, else model.onnx, whose packed weights
    are expanded in memory. That is done twice, and both sessions are timed in interleaved blocks, being
    loaded anew in random order before each round, as `compare` does it; the second one is the control.

    Args:
        runtimes: names in RUNTIMES; none for all `candidates`, of which those that do not work are in
            `not_timed`, with the reason. So is a batch that an engine has no profile for.
        rounds, block_s, warmup_limit_s: see `measure_interleaved`.
        n_threads: None for the cores that this process may use; with fewer, the threads are held to as many
            cores, one of each physical core first.
        seed: of the inputs and the order.
        trust: SHA-256 of the manifest, needed once for engines of a bundle from elsewhere.
        cuda_graphs: engines replay their launches.

    Raises:
        UnknownNameError: no such runtime.
        UsageError: options without meaning, or no batch that fits.
        MissingCapability: a runtime that was named cannot run here, or none can.
        NotTrustedError: nobody vouches for the engines.
        ArtefactError: a file was changed or is damaged.
    """
    check_batches(batches)
    check_measurable(rounds, block_s)
    _check_runtimes(runtimes)
    bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    chosen = tuple(runtimes) or candidates(bundle)
    if cuda_graphs:
        require_cuda_graphs(*chosen)
    report = on_progress or (lambda line: None)
    threads = n_usable_cores() if n_threads is None else n_threads
    timings = [
        Timing(batch=batch, rounds=rounds, block_s=block_s, seed=seed, warmup_limit_s=warmup_limit_s)
        for batch in batches
    ]
    rows: list[BenchRow] = []
    not_timed: list[NotTimed] = []
    broken = False  # that the last one, which runs everywhere, could not run is the fault of the file
    sizes = timed_sizes(bundle, seed)
    with measuring(n_threads=threads, rounds=rounds, block_s=block_s, seed=seed, sizes=sizes) as conditions:
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
                    not_timed.append(
                        _reported(NotTimed(runtime=name, batch=None, why=what_and_do(cause)), report)
                    )
                    broken = isinstance(cause, ArtefactError)
                    continue
                note = runtime_note(bundle, name)
                if note is not None:
                    report(note)
                for timing in timings:
                    found = _timed(sessions, bundle, name, timing, report)
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
        size_bytes=sum(
            file.size_bytes for name, file in bundle.info.files.items() if name.startswith(MODEL_FILE)
        ),
        rows=tuple(rows),
        not_timed=tuple(not_timed),
        cuda_graphs=cuda_graphs,
        **vars(conditions()),
    )


def check_batches(batches: Sequence[int]) -> None:
    """Check batch sizes.

    Raises:
        UsageError: they are not different numbers of at least 1.
    """
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


def _reported(one: NotTimed, report: Callable[[str], None]) -> NotTimed:
    report(f"{one.runtime}{at_batch(one.batch)} is not timed: {one.why}")
    return one


def _why_not(sessions: TimedSessions, bundle: Bundle, batch: int) -> str | None:
    """Why a batch cannot be run, None when it can."""
    try:
        sessions.run("first", timed_inputs(bundle, batch, 0))
    except UsageError as cause:
        return f"{cause.what} {cause.expected}".rstrip()
    return None


def _require_some(
    bundle: Bundle, rows: Sequence[BenchRow], not_timed: Sequence[NotTimed], *, broken: bool
) -> None:
    if rows:
        return
    reasons = "; ".join(f"{one.runtime}{at_batch(one.batch)}: {one.why}" for one in not_timed)
    if broken:
        raise ArtefactError(
            f"Nothing can run {bundle.path}: {reasons}",
            expected="A model.onnx that onnxruntime runs on the CPU was expected.",
        )
    if all(one.batch is None for one in not_timed):
        raise MissingCapability(
            f"Nothing here can run {bundle.path}: {reasons}",
            expected="One runtime at least was expected.",
            do="Run `sparse-export doctor`.",
        )
    raise UsageError(
        f"No batch of {bundle.path} could be timed: {reasons}",
        expected="A batch that the engine has a profile for was expected.",
        do="Ask for another --batch, or build with another --profile.",
    )


def _timed(
    sessions: TimedSessions, bundle: Bundle, runtime: str, timing: Timing, report: Callable[[str], None]
) -> BenchRow | NotTimed:
    batch = timing["batch"]
    why = _why_not(sessions, bundle, batch)
    if why is not None:
        return _reported(NotTimed(runtime=runtime, batch=batch, why=why), report)
    report(f"{runtime} at batch {batch}, {timing['rounds']} rounds")
    feeds = timed_inputs(bundle, batch, timing["seed"])
    results = sessions.measure(feeds, **timing)
    device = sessions.measure_on_device(feeds, **timing).get("first")
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
