"""What a comparison found, as the value that is written and shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from sparse_export.errors import GateFailed
from sparse_export.evaluate.deciding import Ended
from sparse_export.evaluate.per_class import ClassRecall
from sparse_export.evaluate.verdict import speedup_not_reached
from sparse_export.files import write_json
from sparse_export.formats.score import Score
from sparse_export.instruments.conditions import Conditions, clock_notes, conditions_text, onnxruntime_text
from sparse_export.instruments.interleave import LatencyResult
from sparse_export.instruments.outcome import Outcome
from sparse_export.instruments.paired_scores import ScoreDifference
from sparse_export.instruments.statistics import Ratio
from sparse_export.tables import Shown, Table, count_text, ms_text
from sparse_export.tasks.agreement import Agreement, agreement_text, lost_channels_text, output_text
from sparse_export.tasks.scores import (
    MaxDrop,
    better_text,
    capitalized,
    change_text,
    difference_text,
    value_text,
)

RESULT_FILE = "comparison.json"
Row = tuple[str, str, str, str]
_WHY_ENDED = {
    "decided": "after which it was decided",
    "rounds": "the most that were allowed",
    "budget": "for which there was time",
}

__all__ = [
    "RESULT_FILE",
    "Comparison",
    "LatencyComparison",
    "Side",
    "change_of_score",
    "check_gates",
    "write_results",
]


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two bundles.

    Attributes:
        precision: that the graph computes in.
        size_bytes: of model.onnx and its external data.
        score: None when nobody measured it.
        n_parameters, n_nonzero: over the float initializers.
        macs, nonzero_macs: for one sample; None when not known.
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
    score: Score | None


@dataclass(frozen=True, kw_only=True)
class LatencyComparison:
    """Times at one batch size.

    Attributes:
        ratio: dense / sparse, above 1 when sparse is faster.
        control: dense / the same dense file loaded again, which differs from 1 only by what this machine
            cannot resolve.
        confidence: of both intervals; that of all looks at the times together is 0.95.
        ended: the times were told apart (`decided`), or the most rounds or the time were used up.
        floor: the farthest end of the control's interval from 1, as a ratio above 1.
        outcome: of ratio's interval against floor.
        verdict: the outcome in words.
        on_device: the same three of the work on the device alone, by CUDA events, `dense`, `dense again` and
            `sparse`, with device_ratio and device_control; empty and None where the runtime cannot say. No
            outcome rests on these.
    """

    batch: int
    dense: LatencyResult
    dense_again: LatencyResult
    sparse: LatencyResult
    ratio: Ratio
    control: Ratio
    confidence: float
    ended: Ended
    floor: float
    outcome: Outcome
    verdict: str
    on_device: dict[str, LatencyResult] = field(default_factory=dict)
    device_ratio: Ratio | None = None
    device_control: Ratio | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison(Conditions):
    """Everything that `compare` found; `str()` gives the table for people.

    Attributes:
        budget_s: seconds that each batch size had; `rounds` are the most that it had.
        score_source: `measured` here with the very files that were timed, `recorded` in the manifests, or
            None.
        difference: sparse minus dense on the same samples, only when measured.
        classes: recall of each class, where the score is measured and the task is classification.
        agreement: of the outputs, where neither bundle names a data set; its loss is the drop.
        drop: how much worse the score of sparse is, in the unit of both.
        runtime: as its sessions name themselves.
        passed_over: by name, runtimes that would have been better, and why they could not run both.
        gate_failed, speedup_missed: what to report when `max_drop` or `required_speedup` was not kept.
    """

    dense: Side
    sparse: Side
    score_source: Literal["measured", "recorded"] | None
    drop: float | None
    difference: ScoreDifference | None
    latency: tuple[LatencyComparison, ...]
    max_drop: MaxDrop | None
    required_speedup: float | None
    budget_s: float
    gate_failed: str | None
    speedup_missed: str | None
    runtime: str
    passed_over: dict[str, str]
    agreement: Agreement | None = None
    classes: tuple[ClassRecall, ...] = ()

    def shown(self) -> Shown:
        """Both bundles side by side, the verdicts, and the conditions of the measurement."""
        rows = [*_score_rows(self), *_size_rows(self)]
        for at in self.latency:
            rows += [("", "", "", ""), *_latency_rows(at)]
        paths = Table(rows=[("dense", self.dense.path), ("sparse", self.sparse.path)])
        head = ("", "dense", "sparse", "sparse against dense")
        notes = "95 % intervals over all looks at the times"
        conditions = conditions_text(self, onnxruntime_text(self, self.runtime), notes, at_most=True)
        return Shown([paths, Table(head=head, rows=rows, right=(1, 2)), *_notes(self), conditions])

    def __str__(self) -> str:
        return self.shown().draw()


def _score_rows(comparison: Comparison) -> list[Row]:
    found = comparison.agreement
    if found is None:
        return [_score_row(comparison)]
    rows: list[Row] = [("agreement of outputs", "", "", agreement_text(found))]
    rows += [(f"  {one.name}", "", "", output_text(one)) for one in found.outputs]
    rows += [(f"  {name}", "", "", f"not compared: {why}") for name, why in found.left_out.items()]
    return rows


def _size_rows(comparison: Comparison) -> list[Row]:
    dense, sparse = comparison.dense, comparison.sparse
    rows = [
        ("density of masked layers", f"{dense.density:.4f}", f"{sparse.density:.4f}", ""),
        ("precision", dense.precision, sparse.precision, ""),
    ]
    for title, a, b in (
        ("model.onnx, bytes", dense.size_bytes, sparse.size_bytes),
        ("parameters", dense.n_parameters, sparse.n_parameters),
        ("  of them not zero", dense.n_nonzero, sparse.n_nonzero),
        ("multiply-adds a sample", dense.macs, sparse.macs),
        ("  by a weight not zero", dense.nonzero_macs, sparse.nonzero_macs),
    ):
        rows.append(
            (title, count_text(a), count_text(b), f"{b / a:.4f} of dense" if a and b is not None else "")
        )
    return rows


def _latency_rows(at: LatencyComparison) -> list[Row]:
    again = at.dense_again
    rows = [
        (
            f"batch {at.batch}, median ms",
            *_ms(at.dense.median_ms, at.sparse.median_ms),
            f"{at.ratio} as fast",
        ),
        ("  mean ms", *_ms(at.dense.mean_ms, at.sparse.mean_ms), ""),
        ("  90th percentile ms", *_ms(at.dense.p90_ms, at.sparse.p90_ms), ""),
        ("  99th percentile ms", *_ms(at.dense.p99_ms, at.sparse.p99_ms), ""),
        ("  rounds", "", "", f"{at.ratio.n_rounds}, {_WHY_ENDED[at.ended]}"),
        ("  timed calls", count_text(at.dense.n_calls), count_text(at.sparse.n_calls), ""),
        (
            "  control: dense twice, ms",
            *_ms(at.dense.median_ms, again.median_ms),
            f"{at.control} should hold 1",
        ),
    ]
    if at.device_ratio is not None and at.device_control is not None:
        dense, again, sparse = (at.on_device[name] for name in ("dense", "dense again", "sparse"))
        alone, control = f"{at.device_ratio} as fast", f"{at.device_control} should hold 1"
        rows.append(("  on the device alone, ms", *_ms(dense.median_ms, sparse.median_ms), alone))
        rows.append(("    control: dense twice", *_ms(dense.median_ms, again.median_ms), control))
    return rows


def _notes(comparison: Comparison) -> list[str]:
    """What is to be said below the figures, a paragraph each."""
    notes = [at.verdict for at in comparison.latency]
    notes += [_score_note(comparison)] if comparison.agreement is None else []
    beware = lost_channels_text(comparison.agreement)
    notes += [beware] if beware else []
    notes += [f"Passed over: {name}: {why}" for name, why in comparison.passed_over.items()]
    notes += clock_notes(comparison.cards)
    failed = (comparison.gate_failed, comparison.speedup_missed)
    return notes + [f"FAILED: {missed}" for missed in failed if missed]


def change_of_score(comparison: Comparison) -> str:
    """Sparse minus dense in words, with the interval where there is one; or how far their outputs agree."""
    dense, sparse = comparison.dense.score, comparison.sparse.score
    known = dense or sparse
    is_share, of = known is None or known.is_share, None if dense is None else dense.figure
    if comparison.difference is not None:
        return difference_text(comparison.difference, is_share=is_share, of=of)
    if dense is not None and sparse is not None:
        return change_text(sparse.figure - dense.figure, is_share=is_share, of=dense.figure)
    return "" if comparison.agreement is None else agreement_text(comparison.agreement)


def _score_row(comparison: Comparison) -> Row:
    dense, sparse = comparison.dense.score, comparison.sparse.score
    known = dense or sparse
    change = change_of_score(comparison)
    title = "score" if known is None else known.name
    if known is not None and not known.higher_is_better:
        title += f", {better_text(known)}"
    return title, value_text(dense), value_text(sparse), change


def _score_note(comparison: Comparison) -> str:
    known = comparison.dense.score or comparison.sparse.score
    named = "Score" if known is None else capitalized(known.name)
    if comparison.difference:
        d = comparison.difference
        text = f"{named}: measured with these files on {d.n_samples:,} samples, the same for both"
        if d.n_only_a is not None and d.n_only_b is not None:
            return f"{text}; {d.n_only_a:,} only dense has right, {d.n_only_b:,} only sparse."
        if d.n_resamples is not None:
            return f"{text}; the interval is of a bootstrap with {d.n_resamples:,} resamples."
        return f"{text}."
    if comparison.score_source == "recorded":
        return (
            f"{named}: as recorded when the bundles were built, not measured again, so without an interval."
        )
    missing = [n for n, s in (("dense", comparison.dense), ("sparse", comparison.sparse)) if s.score is None]
    return (
        f"{named}: not measured, as no samples with targets were given; the {' and the '.join(missing)} "
        f"bundle record{'s' if len(missing) == 1 else ''} none."
    )


def _ms(a: float | None, b: float | None) -> tuple[str, str]:
    return ms_text(a), ms_text(b)


def check_gates(comparison: Comparison) -> None:
    """Check the requirements that were given to `compare`.

    Raises:
        GateFailed: more was lost than may be.
        SpeedupNotReached: the speed-up that was required was not measured.
    """
    if comparison.gate_failed:
        raise GateFailed(
            comparison.gate_failed,
            expected=f"A loss of at most {comparison.max_drop} was allowed.",
            do="Train longer or at a higher density, leave more layers dense, or allow a larger drop.",
        )
    if comparison.speedup_missed:
        raise speedup_not_reached(
            comparison.speedup_missed,
            comparison.required_speedup or 1.0,
            do="Read the verdicts: zeros alone do not make this runtime faster.",
        )


def write_results(folder: Path, comparison: Comparison) -> Path:
    """Write `comparison.json`, raw samples included, into a folder, which is made when absent.

    Returns:
        Its path.

    Raises:
        OutputError: it cannot be written.
    """
    path = Path(folder) / RESULT_FILE
    write_json(path, {"kind": "comparison", **asdict(comparison)})
    return path
