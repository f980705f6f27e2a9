"""Compares a dense bundle with a sparse one: accuracy, size and time, each with what it can be trusted to."""

from __future__ import annotations

import contextlib
import math
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sparse_export.artefact import (
    BUNDLE_FILE,
    Accuracy,
    Bundle,
    library_versions,
    now,
    open_bundle,
    read_engine_layers,
)
from sparse_export.data import Inputs
from sparse_export.engine.door import TARGETS
from sparse_export.engine.loadable import engine_of, require_genuine
from sparse_export.errors import (
    ArtefactError,
    GateFailed,
    MissingCapability,
    NotTrustedError,
    SpeedupNotReached,
    UsageError,
    what_and_do,
)
from sparse_export.files import sha256_file, write_json
from sparse_export.measure.card import CardLog, watched_cards
from sparse_export.measure.interleave import LatencyResult, check_measurable
from sparse_export.measure.latency import check_batches
from sparse_export.measure.machine import machine_facts, n_usable_cores
from sparse_export.measure.pinning import pinned
from sparse_export.measure.sessions import TimedSessions, Timing
from sparse_export.measure.statistics import (
    AccuracyDifference,
    Ratio,
    paired_accuracy_difference,
    paired_ratio,
    resolution,
)
from sparse_export.runtime import Session
from sparse_export.runtime.choice import KNOW_TWO_FOUR, candidates, open_runtime, runtime_note

__all__ = ["Comparison", "LatencyComparison", "Side", "check_gates", "compare", "judge", "write_results"]

RESULT_FILE = "comparison.json"
LAYERS_FILE = "layers.json"
_ACCURACY_BATCH = 256
_ROUNDING_POINTS = 1e-9
_WIDTH = 98

Outcome = Literal["speed-up", "slow-down", "no difference"]


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two bundles.

    precision: that the graph computes in.  size_bytes: of model.onnx and its external data.  accuracy: None when nobody measured it.  n_parameters,
    n_nonzero: over the float initializers.  macs, nonzero_macs: for one sample; None when not known.
    """

    path: str
    model: str | None
    method: str
    density: float
    precision: str
    size_bytes: int
    n_parameters: int
    n_nonzero: int
    macs: int | None
    nonzero_macs: int | None
    accuracy: Accuracy | None


@dataclass(frozen=True, kw_only=True)
class LatencyComparison:
    """Times at one batch size.

    ratio: dense / sparse, above 1 when sparse is faster.  control: dense / the same dense file loaded again,
    which differs from 1 only by what this machine cannot resolve.  floor: the farthest end of the control's
    interval from 1, as a ratio above 1; outcome: of ratio's interval against floor.
    verdict: the outcome in words.
    on_device: the same three of the work on the device alone, by CUDA events, `dense`, `dense again` and `sparse`, with
    device_ratio and device_control; empty and None where the runtime cannot say. No outcome rests on these.
    """

    batch: int
    dense: LatencyResult
    dense_again: LatencyResult
    sparse: LatencyResult
    ratio: Ratio
    control: Ratio
    floor: float
    outcome: Outcome
    verdict: str
    on_device: dict[str, LatencyResult] = field(default_factory=dict)
    device_ratio: Ratio | None = None
    device_control: Ratio | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that `compare` found; `str()` gives the table for people.

    accuracy_source: `measured` here with the very files that were timed, `recorded` in the manifests, or
    None.  difference: sparse minus dense on the same samples, only when measured.
    accuracy_drop_points: dense minus sparse, in percentage points.
    runtime: as its sessions name themselves.  passed_over: by name, runtimes that would have been better, and why
    they could not run both.  cores: that its threads were held to; () where they had every usable one.  cards: what
    NVML said of cards meanwhile.
    gate_failed, speedup_missed: what to tell when `max_drop_points` or `required_speedup` was not kept.
    """

    dense: Side
    sparse: Side
    accuracy_source: Literal["measured", "recorded"] | None
    accuracy_drop_points: float | None
    difference: AccuracyDifference | None
    latency: tuple[LatencyComparison, ...]
    max_drop_points: float | None
    required_speedup: float | None
    gate_failed: str | None
    speedup_missed: str | None
    runtime: str
    passed_over: dict[str, str]
    n_threads: int
    cores: tuple[int, ...]
    rounds: int
    block_s: float
    seed: int
    machine: dict[str, Any]
    cards: CardLog
    versions: dict[str, str]
    created: str

    def __str__(self) -> str:
        return _table(self)


def compare(
    dense: Bundle | Path,
    sparse: Bundle | Path,
    *,
    batches: Sequence[int] = (1, 32),
    rounds: int = 24,
    block_s: float = 0.02,
    warmup_limit_s: float = 5.0,
    n_threads: int | None = None,
    seed: int = 0,
    samples: tuple[Inputs, np.ndarray] | None = None,
    max_drop: float | None = None,
    require_speedup: float | None = None,
    runtime: str | None = None,
    trust: Sequence[str] = (),
    cuda_graphs: bool = False,
    on_progress: Callable[[str], None] | None = None,
) -> Comparison:
    """Run both bundles on one runtime, their engines or model.onnx, and compare them.

    The dense file is loaded twice, the sparse one once, all with the same number of threads; the three are
    timed in interleaved blocks (`measure_interleaved`) on standard normal input, being closed and loaded
    anew in random order before each round, and each pair's ratio gets a 95 % interval (`paired_ratio`). Idle threads of a session spin for a moment after its block; the order
    being random and mirrored, that meets all three alike.

    samples: the test set as the network takes it: x float32 (n, *input_shape), normalised, y integer (n,);
    None takes the accuracies recorded in the manifests and leaves out the paired difference.
    n_threads: None for the cores this process may use.  rounds, block_s, warmup_limit_s: see
    `measure_interleaved`.  batches: samples in a timed call.
    max_drop: most percentage points of accuracy that sparse may lose.  require_speedup: what the lower end
    of the interval of dense / sparse must reach at every batch size, for bundles of one precision. `check_gates` raises
    when either fails.
    runtime: None for the first of `candidates` that opens both; those before it are told of in `passed_over`.
    trust: SHA-256 of manifests, needed once for engines of bundles from elsewhere.
    cuda_graphs: engines replay their launches; other runtimes have none.
    on_progress: called with a line before each step.
    Raises UsageError (bundles that cannot be compared, options without meaning), UnknownNameError, MissingCapability
    (the runtime cannot work here), NotTrustedError or ArtefactError.
    """
    _check_options(batches, max_drop, require_speedup)
    check_measurable(rounds, block_s)
    dense, sparse = (side if isinstance(side, Bundle) else open_bundle(side) for side in (dense, sparse))
    _check_comparable(dense, sparse)
    if require_speedup is not None:
        _require_one_precision(dense, sparse)
    tell = on_progress or (lambda line: None)
    threads = n_usable_cores() if n_threads is None else n_threads
    machine = machine_facts()
    with watched_cards() as cards, contextlib.ExitStack() as stack:
        cores = stack.enter_context(pinned(threads))
        sessions, name, passed_over = _opened(
            stack, dense, sparse, runtime, threads, trust, seed, cuda_graphs
        )
        if cuda_graphs and name not in TARGETS:
            raise UsageError(
                f"CUDA graphs were asked for, and {name} replays none.",
                expected=f"They were expected to go with {' or '.join(TARGETS)}.",
                do="Leave --cuda-graphs out, or compare bundles with engines.",
            )
        for other, why in passed_over.items():
            tell(f"{other} is passed over: {why}")
        for note in filter(None, (runtime_note(side, name) for side in (dense, sparse))):
            tell(note)
        accuracies: dict[str, Accuracy | None]
        if samples is not None:
            tell(f"accuracy on {len(samples[1])} samples")
            correct = {side: _correct(sessions.open[side], dense, *samples) for side in ("dense", "sparse")}
            difference = paired_accuracy_difference(correct["dense"], correct["sparse"])
            accuracies = {
                side: Accuracy(n_correct=int(hits.sum()), n_samples=hits.size)
                for side, hits in correct.items()
            }
        else:
            difference = None
            accuracies = {"dense": dense.info.accuracy, "sparse": sparse.info.accuracy}
        drop = _drop_points(accuracies["dense"], accuracies["sparse"])
        if max_drop is not None and drop is None:
            raise UsageError(
                f"A drop of at most {max_drop} points is required, but no accuracy is known for both bundles.",
                expected="A test set, or manifests that record an accuracy, were expected.",
                do="Give the test set, or leave the requirement out.",
            )
        latency = tuple(
            _compare_latency(
                sessions,
                name,
                dense,
                sparse,
                {
                    "batch": batch,
                    "rounds": rounds,
                    "block_s": block_s,
                    "seed": seed,
                    "warmup_limit_s": warmup_limit_s,
                },
                tell,
            )
            for batch in batches
        )
        found = sessions.open["dense"].name
    return Comparison(
        dense=_side(dense, accuracies["dense"]),
        sparse=_side(sparse, accuracies["sparse"]),
        accuracy_source=None if drop is None else "recorded" if samples is None else "measured",
        accuracy_drop_points=drop,
        difference=difference,
        latency=latency,
        max_drop_points=max_drop,
        required_speedup=require_speedup,
        gate_failed=_gate_failed(drop, max_drop, accuracies),
        speedup_missed=_speedup_missed(latency, require_speedup),
        runtime=found,
        passed_over=passed_over,
        n_threads=threads,
        cores=cores,
        rounds=rounds,
        block_s=block_s,
        seed=seed,
        machine=machine,
        cards=cards,
        versions=library_versions(),
        created=now(),
    )


def check_gates(comparison: Comparison) -> None:
    """Raise GateFailed, or else SpeedupNotReached, when a requirement given to `compare` was not kept."""
    if comparison.gate_failed:
        raise GateFailed(
            comparison.gate_failed,
            expected=f"At most {comparison.max_drop_points:g} points were allowed.",
            do="Train longer or at a higher density, or allow a larger drop.",
        )
    if comparison.speedup_missed:
        raise SpeedupNotReached(
            comparison.speedup_missed,
            expected=f"At least {comparison.required_speedup:g}x was required, at the lower end of the interval.",
            do="Read the verdicts: zeros alone do not make this runtime faster.",
        )


def write_results(folder: Path, comparison: Comparison) -> Path:
    """Write `comparison.json`, raw samples included, into the folder; return its path. Raises OutputError."""
    path = Path(folder) / RESULT_FILE
    write_json(path, {"kind": "comparison", **asdict(comparison)})
    return path


def _check_options(batches: Sequence[int], max_drop: float | None, require_speedup: float | None) -> None:
    check_batches(batches)
    if max_drop is not None and not (math.isfinite(max_drop) and max_drop >= 0):
        raise UsageError(
            f"The allowed drop is {max_drop} points.", expected="A finite number of at least 0 was expected."
        )
    if require_speedup is not None and not (math.isfinite(require_speedup) and require_speedup >= 1):
        raise UsageError(
            f"The required speed-up is {require_speedup}.",
            expected="A finite ratio of at least 1 was expected.",
            do="Write 1.2 for a fifth more speed.",
        )


def _check_comparable(dense: Bundle, sparse: Bundle) -> None:
    a, b = dense.info, sparse.info
    same_data = None in (a.data, b.data) or _data_identity(a.data) == _data_identity(b.data)
    for what, found_a, found_b, same in (
        (
            "input shapes",
            a.model.input_shape,
            b.model.input_shape,
            a.model.input_shape == b.model.input_shape,
        ),
        ("numbers of classes", a.model.n_classes, b.model.n_classes, a.model.n_classes == b.model.n_classes),
        ("data", _data_identity(a.data), _data_identity(b.data), same_data),
    ):
        if not same:
            raise UsageError(
                f"{dense.path} and {sparse.path} have different {what}: {found_a} and {found_b}.",
                expected="A dense and a sparse bundle of the same task were expected.",
                do="Train both on the same data.",
            )


def _require_one_precision(dense: Bundle, sparse: Bundle) -> None:
    if dense.info.precision != sparse.info.precision:
        raise UsageError(
            f"A speed-up is required of {sparse.path}, which computes in {sparse.info.precision}, over {dense.path}, "
            f"which computes in {dense.info.precision}.",
            expected="One precision was expected, so that what is gained is gained by sparsity.",
            do=f"Build the dense bundle with --precision {sparse.info.precision} too, or leave the requirement out.",
        )


def _data_identity(data: Any) -> tuple[Any, ...] | None:
    return None if data is None else (data.name, data.test_sha256[:12], data.mean, data.std)


def _correct(session: Session, bundle: Bundle, x: Inputs, y: np.ndarray) -> np.ndarray:
    """Whether each sample is classified rightly, bool (n,)."""
    wanted = bundle.info.model.input_shape
    if x.shape[1:] != wanted or y.shape != x.shape[:1] or not len(x):
        raise UsageError(
            f"The test set has inputs of shape {x.shape} and labels of shape {y.shape}.",
            expected=f"Inputs of shape (n, {', '.join(map(str, wanted))}) and labels (n,) were expected.",
            do="Give the test set that belongs to the bundles.",
        )
    step = min(_ACCURACY_BATCH, session.max_batch or _ACCURACY_BATCH)
    guesses = [session.run(x[i : i + step]).argmax(axis=1) for i in range(0, len(x), step)]
    correct: np.ndarray = np.concatenate(guesses) == y
    return correct


def _drop_points(dense: Accuracy | None, sparse: Accuracy | None) -> float | None:
    return None if dense is None or sparse is None else dense.percent - sparse.percent


def _side(bundle: Bundle, accuracy: Accuracy | None) -> Side:
    info = bundle.info
    file = bundle.onnx_path.name
    sizes = {name: fact.size_bytes for name, fact in info.files.items() if name.startswith(file)}
    sizes[file] = bundle.onnx_path.stat().st_size
    return Side(
        path=str(bundle.path),
        model=info.model.name,
        method=info.method,
        density=info.density,
        precision=info.precision,
        size_bytes=sum(sizes.values()),
        n_parameters=info.n_parameters,
        n_nonzero=info.n_nonzero,
        macs=info.macs,
        nonzero_macs=info.nonzero_macs,
        accuracy=accuracy,
    )


def _opened(
    stack: contextlib.ExitStack,
    dense: Bundle,
    sparse: Bundle,
    runtime: str | None,
    n_threads: int,
    trust: Sequence[str],
    seed: int,
    cuda_graphs: bool,
) -> tuple[TimedSessions, str, dict[str, str]]:
    """Sessions of a runtime that opens both, its name, and why better ones did not."""
    given = {sha256_file(side.path / BUNDLE_FILE): side for side in (dense, sparse)}
    passed_over: dict[str, str] = {}
    for name in candidates(dense, sparse) if runtime is None else (runtime,):
        openers = {}
        try:  # a file that was changed ends it; one that nobody vouches for is like one that cannot run
            for side in (dense, sparse) if name in TARGETS else ():
                require_genuine(side, engine_of(side, name), given=_vouched(side, trust, given))
        except NotTrustedError as cause:
            if runtime is not None:
                raise
            passed_over[name] = what_and_do(cause)
            continue
        for role, side in (("dense", dense), ("dense again", dense), ("sparse", sparse)):
            vouched = _vouched(side, trust, given)
            openers[role] = partial(
                open_runtime, side, name, n_threads=n_threads, trust=vouched, cuda_graphs=cuda_graphs
            )
        try:
            return stack.enter_context(TimedSessions(openers, seed)), name, passed_over
        except (MissingCapability, ArtefactError) as cause:
            if runtime is not None or name == "onnxruntime-cpu":
                raise
            passed_over[name] = what_and_do(cause)
    raise AssertionError  # the CPU is among the candidates


def _vouched(side: Bundle, trust: Sequence[str], given: Mapping[str, Bundle]) -> str | None:
    """The digest among `trust` that is this bundle's manifest's. given: bundles by that digest."""
    return next((digest for digest in trust if given.get(digest) is side), None)


def _compare_latency(
    sessions: TimedSessions,
    runtime: str,
    dense: Bundle,
    sparse: Bundle,
    timing: Timing,
    tell: Callable[[str], None],
) -> LatencyComparison:
    batch = timing["batch"]
    tell(f"latency at batch {batch}, {timing['rounds']} rounds")
    shape = dense.info.model.input_shape
    results, on_device = sessions.measure(shape, **timing), sessions.measure_on_device(shape, **timing)
    base, again, other = (results[name] for name in ("dense", "dense again", "sparse"))
    ratio = paired_ratio(base.samples_ms, other.samples_ms)
    control = paired_ratio(base.samples_ms, again.samples_ms)
    outcome, verdict = judge(
        batch=batch,
        ratio=ratio,
        control=control,
        same_shapes=_shapes(dense) == _shapes(sparse),
        share=_compacted_share(dense, sparse),
        has_zeros=sparse.info.n_nonzero < sparse.info.n_parameters,
        steady=base.steady and again.steady and other.steady,
        on_sparse_kernels=_on_sparse_kernels(runtime, sparse),
        precisions=(dense.info.precision, sparse.info.precision),
    )
    return LatencyComparison(
        batch=batch,
        dense=base,
        dense_again=again,
        sparse=other,
        ratio=ratio,
        control=control,
        floor=resolution(control),
        outcome=outcome,
        verdict=verdict,
        on_device=on_device,
        device_ratio=_over_dense(on_device, "sparse"),
        device_control=_over_dense(on_device, "dense again"),
    )


def _over_dense(results: Mapping[str, LatencyResult], name: str) -> Ratio | None:
    return paired_ratio(results["dense"].samples_ms, results[name].samples_ms) if results else None


def _on_sparse_kernels(runtime: str, bundle: Bundle) -> str | None:
    """What is known of sparse kernels there, None for a runtime that has none."""
    if runtime not in KNOW_TWO_FOUR:
        return None
    if runtime not in TARGETS:
        return "it does not tell which layers it runs on them"
    rows = read_engine_layers(bundle.path / LAYERS_FILE, engine_of(bundle, runtime).file)
    counts = Counter(row.state for row in rows)
    told = ", ".join(f"{n} {state}" for state, n in counts.items())
    return f"of its layers {told or 'nothing is known'} (`inspect` says why)"


def _shapes(bundle: Bundle) -> tuple[Any, ...]:
    """What decides the work of a runtime that counts zeros like other weights."""
    return bundle.info.macs, bundle.info.n_parameters, Counter(layer.shape for layer in bundle.info.layers)


def _compacted_share(dense: Bundle, sparse: Bundle) -> float | None:
    """Parameters of a compacted sparse graph / those of the dense one; None when nothing was taken out."""
    a, b = dense.info.n_parameters, sparse.info.n_parameters
    return b / a if sparse.info.compacted is not None and 0 < b < a else None


def judge(
    *,
    batch: int,
    ratio: Ratio,
    control: Ratio,
    same_shapes: bool,
    has_zeros: bool,
    steady: bool,
    share: float | None = None,
    on_sparse_kernels: str | None = None,
    precisions: tuple[str, str] = ("fp32", "fp32"),
) -> tuple[Outcome, str]:
    """The outcome, and the sentences that say it and why, of a ratio dense / sparse and its A/A control.

    Either direction is claimed only when the whole interval of the ratio lies beyond 1 and beyond the
    farthest that the control's interval reaches from 1.  share: parameters of the sparse graph / those of the
    dense one where dead channels were taken out, else None.  on_sparse_kernels: of a runtime that has
    kernels for 2:4, what it tells of them, else None.  precisions: of the dense and of the sparse graph; where they
    differ, nothing is said to come from sparsity.
    """
    floor = resolution(control)
    outcome: Outcome = "no difference"
    if ratio.low > floor:
        outcome = "speed-up"
    elif ratio.high < 1.0 / floor:
        outcome = "slow-down"
    interval = f"[{ratio.low:.3f}, {ratio.high:.3f}]"
    resolved = f"two copies of the dense file differ here by up to {100 * (floor - 1):.1f} %"
    one_precision = precisions[0] == precisions[1]
    if outcome == "speed-up":
        parts = [f"Batch {batch}: speed-up of {ratio.estimate:.3f}x {interval}; {resolved}."]
        if same_shapes and on_sparse_kernels is not None and one_precision:
            parts.append(
                f"Both graphs have the same shapes. The runtime has kernels for 2:4: {on_sparse_kernels}."
            )
        elif same_shapes and one_precision:
            parts.append("Both graphs have the same shapes, so this does not come from skipped zeros.")
    elif outcome == "slow-down":
        slower, low, high = 1 / ratio.estimate, 1 / ratio.high, 1 / ratio.low
        parts = [
            f"Batch {batch}: slow-down, sparse takes {slower:.3f}x as long [{low:.3f}, {high:.3f}]; {resolved}."
        ]
    else:
        parts = [
            f"Batch {batch}: no speed-up; dense / sparse is {ratio.estimate:.3f} {interval} and {resolved}."
        ]
    if not one_precision:
        parts.append(
            f"The dense graph computes in {precisions[0]}, the sparse one in {precisions[1]}: the ratio is of both changes "
            "together, and says nothing of sparsity alone. Build both in one precision to know."
        )
    elif outcome != "speed-up":
        if not same_shapes:
            parts.append("The graphs differ in shape, yet the difference in work does not show as a gain.")
        elif on_sparse_kernels is not None:
            parts.append(
                f"Both graphs have the same shapes. The runtime has kernels for 2:4: {on_sparse_kernels}."
            )
        elif has_zeros:
            parts.append(
                "Both graphs have the same shapes: onnxruntime multiplies a zero like any other weight, also where "
                "a packed file stores none, so zeros do not make it faster."
            )
        else:
            parts.append("Both graphs have the same shapes and hold no zeros to skip.")
    if share is not None and not same_shapes:
        parts.append(
            f"Dead channels were taken out of the sparse graph: it has {share:.3f} of the dense one's parameters"
            f"{', and zeros among them are still multiplied' if has_zeros else ''}."
        )
    if not control.low <= 1.0 <= control.high:
        parts.append("The control itself misses 1: smaller differences than its own mean nothing here.")
    if not steady:
        parts.append("Times had not become steady when warm-up ended; repeat on a quiet machine.")
    return outcome, " ".join(parts)


def _gate_failed(
    drop: float | None, max_drop: float | None, accuracies: dict[str, Accuracy | None]
) -> str | None:
    dense, sparse = accuracies["dense"], accuracies["sparse"]
    if (
        drop is None
        or max_drop is None
        or dense is None
        or sparse is None
        or drop <= max_drop + _ROUNDING_POINTS
    ):
        return None
    return (
        f"The sparse accuracy of {sparse.percent:.2f} % is {drop:.2f} percentage points below the dense one of "
        f"{dense.percent:.2f} %."
    )


def _speedup_missed(latency: tuple[LatencyComparison, ...], required: float | None) -> str | None:
    if required is None:
        return None
    missed = [
        f"{at.ratio.estimate:.3f}x [{at.ratio.low:.3f}, {at.ratio.high:.3f}] at batch {at.batch}"
        for at in latency
        if at.outcome != "speed-up" or at.ratio.low < required
    ]
    return f"The speed-up is {', '.join(missed)}." if missed else None


def _table(comparison: Comparison) -> str:
    dense, sparse = comparison.dense, comparison.sparse
    rows: list[tuple[str, str, str, str]] = [
        ("", "dense", "sparse", "sparse against dense"),
        ("", "", "", ""),
    ]
    rows.append(_accuracy_row(comparison))
    rows.append(("density of masked layers", f"{dense.density:.4f}", f"{sparse.density:.4f}", ""))
    rows.append(("precision", dense.precision, sparse.precision, ""))
    for title, a, b in (
        ("model.onnx, bytes", dense.size_bytes, sparse.size_bytes),
        ("parameters", dense.n_parameters, sparse.n_parameters),
        ("  of them not zero", dense.n_nonzero, sparse.n_nonzero),
        ("multiply-adds a sample", dense.macs, sparse.macs),
        ("  by a weight not zero", dense.nonzero_macs, sparse.nonzero_macs),
    ):
        rows.append((title, _count(a), _count(b), f"{b / a:.4f} of dense" if a and b is not None else ""))
    for at in comparison.latency:
        rows.append(("", "", "", ""))
        rows.append((f"batch {at.batch}, median ms", *_ms(at, "median_ms"), f"{_ratio(at.ratio)} as fast"))
        rows.append(("  mean ms", *_ms(at, "mean_ms"), ""))
        rows.append(("  90th percentile ms", *_ms(at, "p90_ms"), ""))
        rows.append(("  99th percentile ms", *_ms(at, "p99_ms"), ""))
        rows.append(("  timed calls", _count(at.dense.n_calls), _count(at.sparse.n_calls), ""))
        medians = _milliseconds(at.dense.median_ms), _milliseconds(at.dense_again.median_ms)
        rows.append(("  control: dense twice, ms", *medians, f"{_ratio(at.control)} should hold 1"))
        if at.device_ratio is not None and at.device_control is not None:
            dense_ms, again_ms, sparse_ms = (
                _milliseconds(at.on_device[name].median_ms) for name in ("dense", "dense again", "sparse")
            )
            alone, control = (
                f"{_ratio(at.device_ratio)} as fast",
                f"{_ratio(at.device_control)} should hold 1",
            )
            rows.append(("  on the device alone, ms", dense_ms, sparse_ms, alone))
            rows.append(("    control: dense twice", dense_ms, again_ms, control))
    lines = [f"dense   {dense.path}", f"sparse  {sparse.path}", ""]
    lines += [f"{a:<26}{b:>14}{c:>14}   {d}".rstrip() for a, b, c, d in rows]
    lines.append("")
    for paragraph in (*(at.verdict for at in comparison.latency), _accuracy_note(comparison)):
        lines += textwrap.wrap(paragraph, _WIDTH, subsequent_indent="  ")
    for name, why in comparison.passed_over.items():
        lines += textwrap.wrap(f"Passed over: {name}: {why}", _WIDTH, subsequent_indent="  ")
    if comparison.cards.throttled:
        held = f"The card's clock was held down meanwhile: {', '.join(comparison.cards.throttled)}."
        lines += textwrap.wrap(held, _WIDTH, subsequent_indent="  ")
    for missed in (comparison.gate_failed, comparison.speedup_missed):
        if missed:
            lines += textwrap.wrap(f"FAILED: {missed}", _WIDTH, subsequent_indent="  ")
    lines += ["", *textwrap.wrap(_conditions(comparison), _WIDTH)]
    return "\n".join(lines)


def _accuracy_row(comparison: Comparison) -> tuple[str, str, str, str]:
    percents = [
        f"{a.percent:.2f} %" if a else "?" for a in (comparison.dense.accuracy, comparison.sparse.accuracy)
    ]
    change = ""
    if comparison.difference:
        d = comparison.difference
        change = f"{d.points:+.2f} points [{d.low:+.2f}, {d.high:+.2f}]"
    elif comparison.accuracy_drop_points is not None:
        change = f"{0.0 - comparison.accuracy_drop_points:+.2f} points"
    return "accuracy", percents[0], percents[1], change


def _accuracy_note(comparison: Comparison) -> str:
    if comparison.difference:
        d = comparison.difference
        return (
            f"Accuracy: measured with these files on {d.n_samples:,} samples, the same for both; "
            f"{d.n_only_a:,} only dense has right, {d.n_only_b:,} only sparse."
        )
    if comparison.accuracy_source == "recorded":
        return (
            "Accuracy: as recorded when the bundles were built, not measured again, so without an interval."
        )
    return "Accuracy: not known for both bundles."


def _conditions(comparison: Comparison) -> str:
    machine = comparison.machine
    version = next((v for k, v in comparison.versions.items() if k.startswith("onnxruntime")), "")
    load = machine["load_average"]
    where = [machine["cpu_model"] or "unknown CPU", f"{machine['n_cores_usable']} cores"]
    where += [f"load {load[0]}"] if load else []
    held = f" on core {', '.join(map(str, comparison.cores))}" if comparison.cores else ""
    return (
        f"{comparison.runtime} {version}, threads: {comparison.n_threads}{held}, {comparison.rounds} interleaved rounds of "
        f"blocks of {1e3 * comparison.block_s:g} ms, seed {comparison.seed}, 95 % intervals; {', '.join(where)}."
    )


def _count(n: int | None) -> str:
    return "?" if n is None else f"{n:,}"


def _ms(at: LatencyComparison, field: str) -> tuple[str, str]:
    return _milliseconds(getattr(at.dense, field)), _milliseconds(getattr(at.sparse, field))


def _milliseconds(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:.4g}"


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.estimate:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
