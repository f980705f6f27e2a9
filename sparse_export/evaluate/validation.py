"""What validating a bundle found: the value that is written and shown, and its gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from sparse_export.building.golden import batch_sizes
from sparse_export.errors import GateFailed
from sparse_export.files import write_json
from sparse_export.formats.score import Score
from sparse_export.instruments.paired_scores import ScoreDifference
from sparse_export.runtimes.tolerance import OutputDifference
from sparse_export.tables import Shown, Table
from sparse_export.tasks.agreement import Agreement, agreement_text, lost_channels_text, output_text
from sparse_export.tasks.scores import (
    MaxDrop,
    allowed_text,
    change_text,
    difference_text,
    lost_too_much,
    score_text,
)

__all__ = [
    "AgainstDense",
    "BatchParity",
    "Parity",
    "RuntimeResult",
    "Validation",
    "check_gates",
    "differing",
    "minus_dense",
    "write_results",
]

RESULT_FILE = "validation.json"


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far the ONNX file is from its network on the same samples.

    Attributes:
        max_abs_difference: the largest, over all outputs of floats.
        max_relative_difference: likewise, by the spread of the output that it is held against, its standard
            deviation.
        top1_agreement: of a classification with two classes or more, the share of samples with the same
            largest logit; None of other tasks.
        outputs: each output by itself.
    """

    n_samples: int
    max_abs_difference: float
    max_relative_difference: float
    top1_agreement: float | None
    ok: bool
    outputs: tuple[OutputDifference, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BatchParity:
    """How far the ONNX file is from PyTorch on one batch of golden samples.

    max_abs_difference: None where onnxruntime cannot run a batch of that size, or gives another shape or NaN.
    """

    batch: int
    max_abs_difference: float | None
    ok: bool


@dataclass(frozen=True, kw_only=True)
class AgainstDense:
    """The score of the bundle against that of a dense one on the same samples.

    Attributes:
        score: of the dense one, by onnxruntime on the CPU, whatever runs the bundle.
        drop: how much worse that of the bundle is, in the unit of both.
        difference: that of the bundle minus that of the dense one, with its paired 95 % interval.
    """

    path: str
    onnx_sha256: str
    score: Score
    drop: float
    difference: ScoreDifference


@dataclass(frozen=True, kw_only=True)
class RuntimeResult:
    """What another runtime than onnxruntime on the CPU made of the bundle.

    Attributes:
        name: as the session has it.
        golden: against the stored outputs.
        parity: against onnxruntime on the CPU, on the test set; None, as score, where there is none.
        drop: how much worse the score is than the recorded one.
        against: what this runtime made of the bundle against the dense one.
        agreement: with the outputs of the dense one, where there are no labels.
    """

    name: str
    golden: Parity
    parity: Parity | None
    score: Score | None
    drop: float | None = None
    against: AgainstDense | None = None
    agreement: Agreement | None = None


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What validating a bundle found. A gate that failed is raised by `check_gates`.

    Attributes:
        task: whose score it is; None without a test set.
        score: of the ONNX file.
        torch_score: of the network of its run, run as network_form says.
        recorded: what the run reported, or with `recorded_of_dense` what its dense network had. The three are
            None where there is no test set, no run, or no record.
        drop: how much worse the score is than the recorded one, in the unit of both.
        parity: None when the run was not there; run_missing then says what was looked for, and parity_ok
            rests on the golden pair alone.
        network_form: what the network of its run is: `torch`, run by PyTorch, or `onnx`, run by onnxruntime.
        runtimes: the others that ran it.
        not_run: those that could not, and why.
        max_drop: the gate, in the unit of the score or as a share of it like `2%`, None for none.
        agreement: with the outputs of the dense bundle, where there are no labels; of it that may be lost
            which max_drop allows.
    """

    bundle: str
    onnx_sha256: str
    data: str | None
    task: str | None
    score: Score | None
    torch_score: Score | None
    recorded: Score | None
    drop: float | None
    golden: Parity
    parity: Parity | None
    run_missing: str | None
    parity_ok: bool
    atol: float
    rtol: float
    rms: float | None
    max_drop: MaxDrop | None
    against: AgainstDense | None
    versions: dict[str, str]
    created: str
    recorded_of_dense: bool = False
    agreement: Agreement | None = None
    batches: tuple[BatchParity, ...] = ()
    runtimes: tuple[RuntimeResult, ...] = ()
    not_run: dict[str, str] = field(default_factory=dict)
    network_form: Literal["torch", "onnx"] = "torch"
    kind: str = "validation"
    schema_version: int = 2

    def shown(self) -> Shown:
        """Every figure, and the gates that failed."""
        rows = [("bundle", self.bundle), ("test data", self.data or "none")]
        if self.data is not None or self.recorded is not None:
            named = next((one.name for one in (self.score, self.recorded) if one is not None), "score")
            rows.append((f"{named}, ONNX", score_text(self.score)))
            if self.torch_score is not None or self.score is None:
                by = "PyTorch" if self.network_form == "torch" else "its network"
                rows.append((f"{named}, {by}", score_text(self.torch_score)))
            of = "dense network, recorded" if self.recorded_of_dense else "recorded"
            rows.append((f"{named}, {of}", score_text(self.recorded, "none")))
        if self.drop is not None:
            rows.append(
                (
                    "drop from recorded",
                    change_text(
                        self.drop,
                        is_share=self.score is None or self.score.is_share,
                        of=None if self.recorded is None else self.recorded.figure,
                    ),
                )
            )
        # Of a few samples, mostly random: a share of them beside a score would read like one.
        rows.append(("golden pair", parity_text(self.golden, with_predictions=self.score is None)))
        rows.append(("against its network", parity_text(self.parity) if self.parity else "not compared"))
        if self.batches:
            rows.append(("at batch", _batches_text(self.batches)))
        if self.run_missing is not None:
            rows.append(("", f"{self.run_missing} Parity rests on the golden pair alone."))
        if self.against is not None:
            rows.append((f"{self.against.score.name}, dense", score_text(self.against.score)))
            rows.append(("minus dense", minus_dense(self.against)))
        if self.agreement is not None:
            rows.append(("agreement with dense", agreement_text(self.agreement)))
            rows += [(f"  {one.name}", output_text(one)) for one in self.agreement.outputs]
            rows += [(f"  {name}", f"not compared: {why}") for name, why in self.agreement.left_out.items()]
            beware = lost_channels_text(self.agreement)
            rows += [("", beware)] if beware else []
        for one in self.runtimes:
            rows += _runtime_rows(one)
        rows += [(name, f"not run: {why}") for name, why in self.not_run.items()]
        if self.max_drop is not None:
            reference = self.recorded if self.against is None else self.against.score
            rows.append(("gate", allowed_text(self.max_drop, reference)))
        rows.append(("result", "; ".join(failures(self)) or "passed"))
        return Shown([Table(rows=rows)])

    def __str__(self) -> str:
        return self.shown().draw()


def _runtime_rows(one: RuntimeResult) -> list[tuple[str, str]]:
    on_golden = parity_text(one.golden, with_predictions=one.score is None)
    rows = [(one.name, f"golden pair {on_golden}")]
    if one.score is not None:
        rows.insert(0, (one.name, f"{one.score.name} {score_text(one.score)}"))
        rows[1] = ("", rows[1][1])
    if one.parity is not None:
        rows.append(("", f"against onnxruntime-cpu {parity_text(one.parity)}"))
    if one.against is not None:
        rows.append(("", f"minus dense {minus_dense(one.against)}"))
    if one.agreement is not None:
        rows.append(("", f"agreement with dense {agreement_text(one.agreement)}"))
    return rows


def minus_dense(against: AgainstDense) -> str:
    """The difference of two scores in words, with its interval."""
    score = against.score
    text = difference_text(against.difference, is_share=score.is_share, p_value=True, of=score.figure)
    return f"{text}; 95 % interval"


def _batches_text(batches: Sequence[BatchParity]) -> str:
    """`1, 2, 3 and 8: within tolerance`, and which are not."""
    right, wrong = ([one.batch for one in batches if one.ok is ok] for ok in (True, False))
    parts = [f"{batch_sizes(right)}: within tolerance"] if right else []
    return "; ".join([*parts, f"{batch_sizes(wrong)}: OUTSIDE tolerance"] if wrong else parts)


def parity_text(parity: Parity, *, with_predictions: bool = True) -> str:
    """Whether outputs are within tolerance, and by how much they differ.

    Args:
        parity: what was found.
        with_predictions: tell the share of samples with the same prediction too, where it is known.
    """
    agreement = f"{parity.n_samples} samples"
    if parity.top1_agreement is not None and with_predictions:
        agreement = f"same prediction for {100 * parity.top1_agreement:.3f} % of {agreement}"
    return (
        f"{'within' if parity.ok else 'OUTSIDE'} tolerance: max difference {parity.max_abs_difference:.3g} "
        f"({parity.max_relative_difference:.3g} of the spread), {agreement}{''.join(_counted(parity))}"
    )


def _counted(parity: Parity) -> list[str]:
    """Of each output of integers the share that is equal."""
    return [
        f"; {one.name} {100 * one.equal_share:.3f} % equal"
        for one in parity.outputs
        if one.equal_share is not None
    ]


def check_gates(validation: Validation) -> None:
    """Check parity and score against their bounds.

    Raises:
        GateFailed: one is not within them, with the figures.
    """
    failed = failures(validation)
    if failed:
        raise GateFailed(
            f"{validation.bundle}: {'; '.join(failed)}.",
            expected="Every gate was expected to hold.",
            do="Do not ship this bundle before the cause is known.",
        )


def failures(validation: Validation) -> list[str]:
    """What is not within its bounds, a clause each."""
    failed = []
    checks = [("the golden pair", validation.golden), ("the network", validation.parity)]
    for other in validation.runtimes:
        checks += [
            (f"the golden pair on {other.name}", other.golden),
            (f"onnxruntime-cpu on {other.name}", other.parity),
        ]
    for label, parity in checks:
        if parity is not None and not parity.ok:
            failed += differing(parity, label, atol=validation.atol, rtol=validation.rtol, rms=validation.rms)
    wrong, agreeing = ([one.batch for one in validation.batches if one.ok is ok] for ok in (False, True))
    if wrong:
        others = f" and agree at batch {batch_sizes(agreeing)}" if agreeing else ""
        failed.append(f"the outputs differ from the network at batch {batch_sizes(wrong)}{others}")
    found: list[tuple[str, Validation | RuntimeResult]] = [("", validation)]
    found += [(f" on {one.name}", one) for one in validation.runtimes]
    for where, one in found:
        failed += _lost(where, one, validation)
        if one.agreement is not None:
            lost = 100.0 - one.agreement.percent
            clause = lost_too_much(f"agreement{where}", lost, "the dense bundle's own", validation.max_drop)
            failed += [clause] if clause else []
    return failed


def differing(parity: Parity, label: str, *, atol: float, rtol: float, rms: float | None) -> list[str]:
    """Say which outputs are not within tolerance: those of floats together, each of integers by itself.

    Args:
        parity: that does not hold.
        label: what the outputs were held against.
        atol: absolute tolerance.
        rtol: tolerance by the spread; of integers the share that may differ.
        rms: tolerance of the root mean square by the spread; None for none.

    Returns:
        Clauses.
    """
    wrong = [one for one in parity.outputs if not one.ok]
    floats = [one.name for one in wrong if one.equal_share is None]
    found = []
    if floats or not wrong:
        names = f" in {', '.join(floats)}" if len(parity.outputs) > 1 else ""
        found.append(
            f"the outputs differ from {label}{names} by {parity.max_abs_difference:.3g}, more than "
            f"{atol:g} + {rtol:g} * their spread{_typical(wrong, rms)}"
        )
    return found + [
        f"{100 * (1 - one.equal_share):.3g} % of {one.name} differ from {label}, more than {100 * rtol:g} %"
        for one in wrong
        if one.equal_share is not None
    ]


def _typical(wrong: list[OutputDifference], rms: float | None) -> str:
    """A clause on the root mean square, where outputs are held to one."""
    found = [one.rms_difference for one in wrong if one.rms_difference is not None]
    if rms is None or not found:
        return ""
    return f", or by a root mean square of {max(found):.3g} of it, more than {rms:g}"


def _lost(where: str, one: Validation | RuntimeResult, validation: Validation) -> list[str]:
    """Clauses on a score that is worse than the recorded one, and than that of the dense bundle."""
    if one.score is None:
        return []
    what, max_drop = f"{one.score.name}{where}", validation.max_drop
    below_record = lost_too_much(what, one.drop, "the recorded one", max_drop, validation.recorded)
    below_dense = None
    if one.against is not None:
        below_dense = lost_too_much(what, one.against.drop, "the dense bundle's", max_drop, one.against.score)
        if below_dense is not None:
            below_dense += f" (sparse minus dense {minus_dense(one.against)})"
    return [clause for clause in (below_record, below_dense) if clause]


def write_results(folder: str | Path, validation: Validation) -> Path:
    """Write `validation.json` into a folder, which is made when absent.

    Returns:
        Its path.

    Raises:
        OutputError: it cannot be written.
    """
    path = Path(folder) / RESULT_FILE
    write_json(path, asdict(validation))
    return path
