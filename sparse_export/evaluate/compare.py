"""`compare`: a dense and a sparse bundle on one runtime: score, size and time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparse_export.errors import UsageError
from sparse_export.evaluate.bench import check_batches
from sparse_export.evaluate.compare_times import compare_latency, speedup_missed
from sparse_export.evaluate.comparison import Comparison, Side
from sparse_export.evaluate.deciding import Round
from sparse_export.evaluate.evaluator import Samples, checked_samples, score_each
from sparse_export.evaluate.per_class import ClassRecall, recall_per_class
from sparse_export.evaluate.references import require_same_inputs
from sparse_export.evaluate.sessions import Opened, Timing, opened_both, timed_sizes
from sparse_export.evaluate.test_set import is_scored
from sparse_export.evaluate.unlabelled import unlabelled
from sparse_export.formats.bundle import MODEL_FILE, Bundle, open_bundle
from sparse_export.formats.score import Score
from sparse_export.instruments.conditions import measuring
from sparse_export.instruments.interleave import check_measurable
from sparse_export.instruments.looks import looks_of
from sparse_export.instruments.machine import n_usable_cores
from sparse_export.instruments.outcome import require_possible_speedup
from sparse_export.instruments.paired_scores import ScoreDifference
from sparse_export.runtimes.choice import runtime_note
from sparse_export.runtimes.outputs import output_batches
from sparse_export.tasks.agreement import Agreement, agreement_of
from sparse_export.tasks.samples import LabelledSamples
from sparse_export.tasks.scores import MaxDrop, drop_of, lost_too_much, require_possible_drop, value_text
from sparse_export.tasks.task import Task

__all__ = ["compare", "require_possible_timing"]


def compare(
    dense: Bundle | Path,
    sparse: Bundle | Path,
    *,
    batches: Sequence[int] = (1, 32),
    rounds: int = 40,
    budget_s: float = 120.0,
    block_s: float = 0.02,
    warmup_limit_s: float = 5.0,
    n_threads: int | None = None,
    seed: int = 0,
    samples: Samples | LabelledSamples | None = None,
    inputs: str | Path | None = None,
    judge: Task | None = None,
    max_drop: MaxDrop | None = None,
    require_speedup: float | None = None,
    runtime: str | None = None,
    trust: Sequence[str] = (),
    cuda_graphs: bool = False,
    on_progress: Callable[[str], None] | None = None,
    on_round: Round | None = None,
) -> Comparison:
    """Run both bundles on one runtime, their engines or model.onnx, and compare them.

    The dense file is loaded twice, the sparse one once, all with the same number of threads; the three are
    timed in interleaved blocks (`measure_interleaved`) on standard normal input, being closed and loaded anew
    in random order before each round. The times are looked at after 8 rounds and at half as many again each
    time; a batch size ends as soon as dense and sparse are told apart, or differ by less than 3 %. The
    intervals of all looks together hold the true ratio in 95 % of measurements (`looks_of`). Idle threads of
    a session spin for a moment after its block; the order being random and mirrored, that meets all three
    alike.

    Args:
        dense: a bundle, or its folder.
        sparse: likewise, of the same task.
        batches: samples in a timed call.
        rounds: the most at each batch size, 8 at least.
        budget_s: seconds at each batch size, after which it ends undecided.
        block_s: see `measure_interleaved`.
        warmup_limit_s: see `measure_interleaved`.
        n_threads: None for the cores this process may use.
        seed: of the timed inputs, and of the order.
        samples: the test set, as `test_set_of` gives it, or as the network takes it: x float32
            (n, *input_shape), normalised, and targets of its task, one a sample, arrays or tensors. None
            takes the scores recorded in the manifests and leaves out the paired difference.
        judge: a task of the user's own by which these are compared, see `agreement_of`; None for the
            agreement of the outputs.
        inputs: file or folder of inputs without labels, on which the outputs of both are compared where the
            bundles name no data set; None for the golden ones of the dense bundle.
        max_drop: how much worse the score of sparse may be, as `validate` takes it.
        require_speedup: what the lower end of the interval of dense / sparse must reach at every batch size,
            for bundles of one precision.
        runtime: None for the first of `candidates` that opens both; those before it are in `passed_over`.
        trust: SHA-256 of manifests, needed once for engines of bundles from elsewhere.
        cuda_graphs: engines replay their launches; other runtimes have none.
        on_progress: called with a line before each step.
        on_round: told of each round that is timed.

    Returns:
        What was found; a requirement that was not kept is in it, for `check_gates` to raise.

    Raises:
        UsageError: bundles that cannot be compared, options without meaning, labels that are not class
            numbers of a network with several outputs.
        GateFailed: outputs that are NaN or infinite.
        UnknownNameError: no such runtime.
        MissingCapability: the runtime cannot work here.
        NotTrustedError: nobody vouches for engines of that runtime.
        ArtefactError: a file was changed or is damaged.
    """
    check_batches(batches)
    require_possible_drop(max_drop)
    require_possible_speedup(require_speedup, example="Write 1.2 for a fifth more speed.")
    require_possible_timing(rounds, budget_s, block_s)
    dense, sparse = (side if isinstance(side, Bundle) else open_bundle(side) for side in (dense, sparse))
    _check_comparable(dense, sparse)
    if require_speedup is not None:
        _require_one_precision(dense, sparse)
    checked = samples if isinstance(samples, LabelledSamples) else None
    if isinstance(samples, tuple):
        checked = checked_samples(samples, dense)
    report = on_progress or (lambda line: None)
    threads = n_usable_cores() if n_threads is None else n_threads
    timings = [
        Timing(batch=batch, rounds=rounds, block_s=block_s, seed=seed, warmup_limit_s=warmup_limit_s)
        for batch in batches
    ]
    with (
        measuring(
            n_threads=threads, rounds=rounds, block_s=block_s, seed=seed, sizes=timed_sizes(dense, seed)
        ) as conditions,
        opened_both(
            dense,
            sparse,
            runtime=runtime,
            n_threads=threads,
            trust=trust,
            seed=seed,
            cuda_graphs=cuda_graphs,
        ) as opened,
    ):
        _report_runtime(opened, dense, sparse, report)
        found = _scores(opened, dense, sparse, checked, report)
        agreement = None
        if checked is None and not is_scored(dense, None) and not is_scored(sparse, None):
            agreement = _agreement(opened, dense, inputs, judge, report)
        drop = drop_of(found.sparse, found.dense)
        if drop is None and agreement is not None:
            drop = 100.0 - agreement.percent
        if max_drop is not None:
            _require_known(drop, max_drop)
        latency = tuple(
            compare_latency(
                opened,
                dense,
                sparse,
                timing,
                budget_s=budget_s,
                required=require_speedup,
                report=report,
                on_round=on_round,
            )
            for timing in timings
        )
        name = opened.sessions.open["dense"].name
    return Comparison(
        dense=_side(dense, found.dense),
        sparse=_side(sparse, found.sparse),
        score_source=found.source,
        drop=drop,
        difference=found.difference,
        agreement=agreement,
        classes=found.classes,
        latency=latency,
        max_drop=max_drop,
        required_speedup=require_speedup,
        budget_s=budget_s,
        gate_failed=_gate_failed(found, agreement, drop, max_drop),
        speedup_missed=speedup_missed(latency, require_speedup),
        runtime=name,
        passed_over=opened.passed_over,
        **vars(conditions()),
    )


def require_possible_timing(rounds: int, budget_s: float, block_s: float) -> None:
    """Check how much `compare` may measure.

    Args:
        rounds: the most at each batch size.
        budget_s: seconds at each batch size.
        block_s: seconds of a block.

    Raises:
        UsageError: too few rounds for a first look, or a time that is not positive.
    """
    looks_of(rounds)
    check_measurable(rounds, block_s, fewest=1)
    if not 0 < budget_s < float("inf"):
        raise UsageError(f"The budget is {budget_s} s.", do="Give a number of seconds above 0.")


@dataclass(frozen=True, kw_only=True)
class _Scores:
    """The scores of both bundles.

    Attributes:
        source: where they are from; None where one is not known.
    """

    dense: Score | None
    sparse: Score | None
    difference: ScoreDifference | None
    source: Literal["measured", "recorded"] | None
    classes: tuple[ClassRecall, ...] = ()


def _scores(
    opened: Opened,
    dense: Bundle,
    sparse: Bundle,
    samples: LabelledSamples | None,
    report: Callable[[str], None],
) -> _Scores:
    """Score the sessions that are timed, or take what the manifests record."""
    if samples is None:
        recorded = dense.info.score, sparse.info.score
        source: Literal["recorded"] | None = None if None in recorded else "recorded"
        return _Scores(dense=recorded[0], sparse=recorded[1], difference=None, source=source)
    report(f"{samples.task.score_name} on {len(samples.targets)} samples")
    of_dense, of_sparse = score_each(
        {f"The {role} bundle": opened.sessions.open[role] for role in ("dense", "sparse")}, samples
    )
    return _Scores(
        dense=of_dense.score,
        sparse=of_sparse.score,
        difference=of_sparse.minus(of_dense),
        source="measured",
        classes=recall_per_class(of_dense, of_sparse, samples, _class_names(dense)),
    )


def _class_names(bundle: Bundle) -> Sequence[str]:
    return bundle.info.task.labels


def _require_known(drop: float | None, max_drop: MaxDrop) -> None:
    """Raise UsageError where nobody can say how much is lost."""
    if drop is None:
        raise UsageError(
            f"A drop of at most {max_drop} is required, but no score is known for both bundles.",
            expected="A test set, or manifests that record a score, were expected.",
            do="Give the test set, or leave the requirement out.",
        )


def _agreement(
    opened: Opened,
    dense: Bundle,
    inputs: str | Path | None,
    judge: Task | None,
    report: Callable[[str], None],
) -> Agreement:
    """How far the outputs of the sparse session agree with those of the dense one."""
    signature = dense.info.signature
    found = unlabelled(dense, inputs)
    report(f"agreement of the outputs on {found.words}")
    first, second = (
        output_batches(opened.sessions.open[role], found.samples, who=f"The {role} bundle")
        for role in ("dense", "sparse")
    )
    pairs = ((a, b) for (_, a), (_, b) in zip(first, second, strict=True))
    return agreement_of(pairs, signature, inputs=found.words, judge=judge)


def _gate_failed(
    found: _Scores, agreement: Agreement | None, drop: float | None, max_drop: MaxDrop | None
) -> str | None:
    if agreement is not None:
        clause = lost_too_much("The agreement with the dense network", drop, "its own", max_drop)
        return None if clause is None else f"{clause}."
    named = "score" if found.sparse is None else found.sparse.name
    what, than = f"The sparse {named} of {value_text(found.sparse)}", value_text(found.dense)
    clause = lost_too_much(what, drop, f"the dense one of {than}", max_drop, found.dense)
    return None if clause is None else f"{clause}."


def _check_comparable(dense: Bundle, sparse: Bundle) -> None:
    require_same_inputs(dense, sparse)
    a, b = dense.info, sparse.info
    same_data = None in (a.data, b.data) or _data_identity(a.data) == _data_identity(b.data)
    for what, found_a, found_b, same in (
        ("inputs or outputs", a.signature, b.signature, a.signature.agrees_with(b.signature)),
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
            f"A speed-up is required of {sparse.path}, which computes in {sparse.info.precision}, over "
            f"{dense.path}, which computes in {dense.info.precision}.",
            expected="One precision was expected, so that what is gained is gained by sparsity.",
            do=(
                f"Build the dense bundle with --precision {sparse.info.precision} too, or leave the "
                "requirement out."
            ),
        )


def _data_identity(data: Any) -> tuple[Any, ...] | None:
    return None if data is None else (data.name, data.test_sha256[:12], data.mean, data.std)


def _report_runtime(opened: Opened, dense: Bundle, sparse: Bundle, report: Callable[[str], None]) -> None:
    for other, why in opened.passed_over.items():
        report(f"{other} is passed over: {why}")
    for side in (dense, sparse):
        note = runtime_note(side, opened.runtime)
        if note:
            report(note)


def _side(bundle: Bundle, found: Score | None) -> Side:
    info = bundle.info
    sizes = {name: file.size_bytes for name, file in info.files.items() if name.startswith(MODEL_FILE)}
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
        score=found,
    )
