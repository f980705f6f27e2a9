"""The links that take a measurement: the score is kept, speed is reached."""

from __future__ import annotations

from collections.abc import Sequence

from sparse_export.errors import GateFailed, SparseExportError
from sparse_export.evaluate.comparison import Comparison
from sparse_export.evaluate.links.case import Case
from sparse_export.evaluate.links.chain import Figure, Finding
from sparse_export.evaluate.validation import Validation, check_gates, minus_dense
from sparse_export.evaluate.verdict import speedup_not_reached
from sparse_export.tasks.agreement import Agreement, agreement_text, lost_channels_text, output_text
from sparse_export.tasks.scores import (
    allowed_drop,
    allowed_text,
    capitalized,
    drop_of,
    lost_too_much,
    score_text,
    value_text,
)

__all__ = ["score_is_kept", "speed_is_reached"]


def score_is_kept(case: Case, validation: Validation) -> Finding:
    """The files give what was trained, and lose no more than max_drop on the test set, whoever runs them.

    Args:
        validation: of the bundle against the dense one.
    """
    if validation.agreement is not None:
        return _agreement_is_kept(case, validation, validation.agreement)
    against, score = validation.against, validation.score
    if against is None or score is None:
        raise GateFailed(f"The score of {validation.bundle} was not measured.")
    told = [
        (
            f"model.onnx has {score.name} {score_text(score)} on the test set of {validation.data}, the "
            f"dense bundle {score_text(against.score)}"
        ),
        f"that is {minus_dense(against)}",
        allowed_text(case.max_drop, against.score),
    ]
    figures: dict[str, Figure] = {
        "score": score.figure,
        "dense_score": against.score.figure,
        "difference": against.difference.amount,
        "difference_low": against.difference.low,
        "difference_high": against.difference.high,
        "allowed_drop": allowed_drop(case.max_drop, against.score),
    }
    if against.difference.mcnemar_p is not None:
        figures["mcnemar_p"] = against.difference.mcnemar_p
    lost = [("model.onnx", against.drop)]
    for one in validation.runtimes:
        drop = drop_of(one.score, against.score)
        if drop is not None:
            lost.append((one.name, drop))
            told.append(f"{one.name} has {value_text(one.score)}")
    told += [f"{name} was not run: {why}" for name, why in validation.not_run.items()]
    than = f"the dense bundle ({value_text(against.score)})"
    found = [lost_too_much(name, drop, than, case.max_drop, against.score) for name, drop in lost]
    wrong = [clause for clause in found if clause]
    problem: SparseExportError | None = None
    if wrong:
        problem = GateFailed(
            f"{capitalized(score.name)} was lost: {'; '.join(wrong)}; sparse minus dense is "
            f"{minus_dense(against)}.",
            expected=f"{capitalized(allowed_text(case.max_drop, against.score))}.",
            do="Train longer or at a higher density, leave more layers dense, or allow a larger drop.",
        )
    else:
        try:
            check_gates(validation)
        except GateFailed as cause:
            problem = cause
    return Finding(told=tuple(told), figures=figures, problem=problem)


def _agreement_is_kept(case: Case, validation: Validation, agreement: Agreement) -> Finding:
    """The outputs agree with those of the dense bundle, by all but max_drop, whoever runs them."""
    told = [f"the outputs agree with those of the dense bundle by {agreement_text(agreement)}"]
    told += [f"{one.name}: {output_text(one)}" for one in agreement.outputs]
    beware = lost_channels_text(agreement)
    told += [beware] if beware else []
    told += [f"{name} is not compared: {why}" for name, why in agreement.left_out.items()]
    told.append(allowed_text(case.max_drop))
    figures: dict[str, Figure] = {
        "agreement_percent": agreement.percent,
        "agreement_percent_low": agreement.low,
        "agreement_percent_high": agreement.high,
        "allowed_drop": allowed_drop(case.max_drop),
    }
    lost = [("model.onnx", agreement)]
    lost += [(one.name, one.agreement) for one in validation.runtimes if one.agreement is not None]
    told += [f"{name} was not run: {why}" for name, why in validation.not_run.items()]
    found = [lost_too_much(name, 100.0 - one.percent, "full agreement", case.max_drop) for name, one in lost]
    wrong = [clause for clause in found if clause]
    problem: SparseExportError | None = None
    if wrong:
        problem = GateFailed(
            f"Agreement with the dense bundle was lost: {'; '.join(wrong)}.",
            expected=f"{capitalized(allowed_text(case.max_drop))}.",
            do="Make fewer layers sparse, calibrate on real inputs, or allow a larger drop.",
        )
    else:
        try:
            check_gates(validation)
        except GateFailed as cause:
            problem = cause
    return Finding(told=tuple(told), figures=figures, problem=problem)


def speed_is_reached(case: Case, comparisons: Sequence[Comparison]) -> Finding:
    """The whole interval of dense / sparse is at or above what was promised, at every batch size and runtime.

    Args:
        comparisons: of the dense bundle with this one, one for each runtime.
    """
    figures: dict[str, Figure] = {"required_speedup": case.require_speedup or 1.0}
    told, missed = [], []
    for place, comparison in enumerate(comparisons):
        prefix = f"{comparison.runtime}_" if place else ""
        for at in comparison.latency:
            figures |= {
                f"{prefix}batch_{at.batch}_speedup": at.ratio.estimate,
                f"{prefix}batch_{at.batch}_speedup_low": at.ratio.low,
                f"{prefix}batch_{at.batch}_speedup_high": at.ratio.high,
                f"{prefix}batch_{at.batch}_floor": at.floor,
            }
        told += [
            f"{at.verdict} {at.dense.median_ms:.4g} ms dense, {at.sparse.median_ms:.4g} ms sparse, "
            f"{at.ratio.n_rounds} interleaved rounds"
            for at in comparison.latency
        ]
        told.append(f"measured with {comparison.runtime}, threads: {comparison.n_threads}")
        told += [f"{name} is passed over: {why}" for name, why in comparison.passed_over.items()]
        if comparison.speedup_missed:
            missed.append(f"With {comparison.runtime}: {comparison.speedup_missed}")
    problem = None
    if missed:
        problem = speedup_not_reached(
            " ".join(missed),
            case.require_speedup or 1.0,
            do="Deploy the dense bundle where it is as fast, or promise no speed-up.",
        )
    return Finding(told=tuple(told), figures=figures, problem=problem)
