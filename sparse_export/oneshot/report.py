"""What sparsify did, layer by layer and step by step."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_export.formats.score import Score
from sparse_export.oneshot.choice import Choice
from sparse_export.oneshot.recovery import JointResult, NormsResult, RecoveryResult
from sparse_export.tables import Shown, Table, shape_text
from sparse_export.tasks.agreement import Agreement, agreement_text, lost_channels_text, output_text
from sparse_export.tasks.scores import value_text
from sparse_export.train.starting_point import STARTED

REPORT_FILE = "sparsify.json"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The network after a step.

    Attributes:
        name: `original`, `permuted`, `sparsified` or `fine-tuned`.
        validation, test: scores, None without data or for an empty part.
        agreement: with the outputs of the dense network, where there are no labels.
        seconds: that the step took, without the evaluation.
    """

    name: str
    validation: Score | None
    test: Score | None
    seconds: float
    agreement: Agreement | None = None


@dataclass(frozen=True, kw_only=True)
class SparsifiedLayer:
    """A weight after sparsifying.

    Attributes:
        pattern: that it keeps, or None where it stayed as it was, and `reason` says why.
        reason: also why no channel order was searched for it, where one was asked for, and why no error was
            measured, where there are data.
        magnitude: the sum of |w| before.
        kept_in_order: share of it that N of M keep at most in the order that the channels had.
        kept_share: share of it where the mask is on.
        error: ‖X (W - W')‖ / ‖X W‖ over the calibration data, X as the layers before it then made it; None
            without calibration data, and where `reason` says why, as it does for `magnitude` unless errors were
            asked for.
        n_active: entries that the mask keeps.
    """

    name: str
    shape: tuple[int, ...]
    n_weights: int
    n_active: int
    pattern: str | None
    reason: str
    magnitude: float
    kept_in_order: float | None
    kept_share: float | None
    error: float | None


@dataclass(frozen=True, kw_only=True)
class SparsifyReport:
    """The whole of it; `sparsify.json` in the run's folder.

    Attributes:
        weights: where they came from, `sha256` of a file or of a run's `run.json` included.
        n_calibration: samples of the training part that were looked at; 0 without data, and where the method
            looks at none and no errors were asked for.
        permuted_spaces: spaces of channels that got another order, of `n_spaces`.
        output_difference: the largest between the outputs before and after, of the largest output, in
            float64, of an ONNX graph in float32; 0 where nothing was permuted.
        untraced: why no order could be looked for, or empty.
        n_resumed: layers that an earlier process had finished before it ended.
        kept_share: over the layers that got the pattern.
        n_norms: batch norms that were re-estimated, and kept so.
        choice: how layers were chosen under a bound on what may be lost; None without one.
        recovery: whether bringing layers back towards the dense network helped; None where it was not tried.
        norms: whether re-estimated batch norms helped; None where they were not asked for, or there are none.
        joint: whether fitting the kept weights together helped; None where it was not asked for.
    """

    model: str
    weights: dict[str, str]
    pattern: str
    method: str
    permute: bool
    moving: bool
    epochs: int
    seed: int
    n_calibration: int
    n_norms: int
    permuted_spaces: int
    n_spaces: int
    output_difference: float
    untraced: str
    kept_share: float
    layers: tuple[SparsifiedLayer, ...]
    stages: tuple[Stage, ...]
    n_resumed: int = 0
    choice: Choice | None = None
    recovery: RecoveryResult | None = None
    norms: NormsResult | None = None
    joint: JointResult | None = None

    def shown(self) -> Shown:
        """What each layer kept, how good the network was after each step, and a summary."""
        tables = [_stage_table(self)] if _is_scored(self) or not _has_agreement(self) else []
        tables += [_agreement_table(self)] if _has_agreement(self) else []
        chosen = Shown([]) if self.choice is None else self.choice.shown()
        return Shown([_layer_table(self), *tables]) + chosen + Shown([_summary(self)])

    def __str__(self) -> str:
        return self.shown().draw()


def _layer_table(report: SparsifyReport) -> Table:
    rows = []
    for layer in report.layers:
        kept = "" if layer.kept_share is None else f"{layer.kept_share:.4f}"
        if report.permute and layer.kept_in_order is not None:
            kept += f" (in order {layer.kept_in_order:.4f})"
        error = "" if layer.error is None else f"{layer.error:.4f}"
        shape = shape_text(layer.shape)
        rows.append((layer.name, shape, layer.pattern or "dense", kept, error, layer.reason))
    return Table(head=("layer", "shape", "pattern", "sum |w| kept", "error", "note"), rows=rows)


def _is_scored(report: SparsifyReport) -> bool:
    return any(stage.validation is not None or stage.test is not None for stage in report.stages)


def _has_agreement(report: SparsifyReport) -> bool:
    return any(stage.agreement is not None for stage in report.stages)


def _stage_table(report: SparsifyReport) -> Table:
    rows = [
        (
            stage.name,
            value_text(stage.validation, "-"),
            value_text(stage.test, "-"),
            f"{stage.seconds:.1f}",
        )
        for stage in report.stages
    ]
    named = {one.name for stage in report.stages for one in (stage.validation, stage.test) if one}
    test = f"test {named.pop()}" if len(named) == 1 else "test"
    return Table(head=("step", "validation", test, "seconds"), rows=rows)


def _agreement_table(report: SparsifyReport) -> Table:
    rows: list[tuple[str, ...]] = []
    for stage in report.stages:
        if stage.agreement is None:
            continue
        rows.append((stage.name, "all outputs", agreement_text(stage.agreement), f"{stage.seconds:.1f}"))
        rows += [("", one.name, output_text(one), "") for one in stage.agreement.outputs]
        rows += [("", name, f"not compared: {why}", "") for name, why in stage.agreement.left_out.items()]
    return Table(head=("step", "output", "agreement with the dense network", "seconds"), rows=rows)


def _summary(report: SparsifyReport) -> str:
    n_sparse = sum(layer.pattern is not None for layer in report.layers)
    found = f"{n_sparse} of {len(report.layers)} layers are {report.pattern} by {report.method}"
    parts = [f"{found}; they keep {report.kept_share:.4f} of their sum of |w|"]
    if report.n_resumed:
        parts.append(f"{report.n_resumed} layers had been finished before the command was ended")
    if not _is_scored(report) and not _has_agreement(report):
        parts.append("no score was measured: no data were given")
    if report.n_calibration:
        parts.append(f"{report.n_calibration:,} samples were looked at")
    if report.recovery is not None:
        parts.append(str(report.recovery))
    if report.norms is not None:
        parts.append(str(report.norms))
    if report.joint is not None:
        parts.append(str(report.joint))
    beware = lost_channels_text(report.stages[-1].agreement if report.stages else None)
    if beware:
        parts.append(beware)
    if report.permute:
        parts.append(
            report.untraced
            or f"{report.permuted_spaces} of {report.n_spaces} channel spaces got another order, the outputs "
            f"differ by {report.output_difference:.1g} of the largest"
        )
    return "\n".join(parts)


def method_name(report: SparsifyReport) -> str:
    """As the run's record names it."""
    return f"{STARTED}{report.method}"


def promised(report: SparsifyReport) -> dict[str, str]:
    """The pattern of each weight that keeps one."""
    return {layer.name: layer.pattern for layer in report.layers if layer.pattern is not None}


def why_dense(report: SparsifyReport) -> dict[str, str]:
    """Why each of the others keeps none."""
    return {layer.name: layer.reason for layer in report.layers if layer.pattern is None}
