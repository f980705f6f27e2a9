"""What validating a bundle found as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparse_export.building.golden import batch_sizes
from sparse_export.evaluate.validation.gates import failures
from sparse_export.formats.run import Accuracy

if TYPE_CHECKING:
    from sparse_export.evaluate.validation.result import (
        AgainstDense,
        BatchParity,
        Parity,
        RuntimeResult,
        Validation,
    )

__all__ = ["table"]


Row = tuple[str, str]


def table(validation: Validation) -> str:
    rows = [("bundle", validation.bundle), ("test data", validation.data or "none")]
    for label, accuracy, missing in (
        ("accuracy, ONNX", validation.accuracy, "not measured"),
        ("accuracy, PyTorch", validation.torch_accuracy, "not measured"),
        ("accuracy, recorded", validation.recorded, "none"),
    ):
        rows.append((label, missing if accuracy is None else _accuracy_text(accuracy)))
    if validation.drop_points is not None:
        rows.append(("drop from recorded", f"{validation.drop_points:+.3f} points"))
    rows.append(("golden pair", _parity_text(validation.golden)))
    rows.append(("against PyTorch", _parity_text(validation.parity) if validation.parity else "not compared"))
    if validation.batches:
        rows.append(("at batch", _batches_text(validation.batches)))
    if validation.run_missing is not None:
        rows.append(("", f"{validation.run_missing} Parity rests on the golden pair alone."))
    if validation.against is not None:
        rows.append(("accuracy, dense", _accuracy_text(validation.against.accuracy)))
        rows.append(("minus dense", _against_text(validation.against)))
    for one in validation.runtimes:
        rows += _runtime_rows(one)
    rows += [(name, f"not run: {why}") for name, why in validation.not_run.items()]
    failed = failures(validation)
    if validation.max_drop is not None:
        rows.append(("gate", f"at most {validation.max_drop:g} points lost"))
    rows.append(("result", "; ".join(failed) if failed else "passed"))
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {text}".rstrip() for label, text in rows)


def _runtime_rows(one: RuntimeResult) -> list[Row]:
    rows = [(one.name, f"accuracy {_accuracy_text(one.accuracy)}")]
    rows.append(("", f"golden pair {_parity_text(one.golden)}"))
    if one.parity is not None:
        rows.append(("", f"against onnxruntime-cpu {_parity_text(one.parity)}"))
    if one.against is not None:
        rows.append(("", f"minus dense {_against_text(one.against)}"))
    return rows


def _accuracy_text(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return "not measured"
    return f"{accuracy.percent:.3f} % ({accuracy.n_correct}/{accuracy.n_samples})"


def _against_text(against: AgainstDense) -> str:
    interval = f"[{against.low:+.3f}, {against.high:+.3f}]"
    return f"{against.points:+.3f} points, 95 % interval {interval}, McNemar p {against.mcnemar_p:.3g}"


def _batches_text(batches: Sequence[BatchParity]) -> str:
    """`1, 2, 3 and 8: within tolerance`, and which are not."""
    wrong = [one.batch for one in batches if not one.ok]
    right = [one.batch for one in batches if one.ok]
    parts = [f"{batch_sizes(right)}: within tolerance"] if right else []
    return "; ".join([*parts, f"{batch_sizes(wrong)}: OUTSIDE tolerance"] if wrong else parts)


def _parity_text(parity: Parity) -> str:
    agreement = f"{parity.n_samples} samples"
    if parity.top1_agreement is not None:
        agreement = f"same prediction for {100 * parity.top1_agreement:.3f} % of {agreement}"
    return (
        f"{'within' if parity.ok else 'OUTSIDE'} tolerance: max difference {parity.max_abs_difference:.3g} "
        f"({parity.max_relative_difference:.3g} of the logits' spread), {agreement}"
    )
