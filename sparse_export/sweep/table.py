"""What the complete cells of a grid came to: a row for each method, density and setting, over its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

from sparse_export.formats.run import read_run_info
from sparse_export.formats.score import Score
from sparse_export.instruments.statistics import Mean, mean_interval
from sparse_export.sweep.grid import DENSE
from sparse_export.sweep.run_list import Setting, heading, setting_text
from sparse_export.sweep.running import Finding
from sparse_export.tables import Shown, Table
from sparse_export.tasks.scores import mean_text

Part = Literal["test", "validation"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one method came to at one density and setting, over its seeds.

    The estimates are means over the seeds, see `sparse_export.formats.run.SpeedInfo`.

    Attributes:
        test, validation: scores over the seeds, shares in percent; None without such a part or a complete
            cell.
        score_name, is_share, higher_is_better: which score that is, see `sparse_export.formats.score.Score`;
            the name is empty where there is none.
        step_ms: median over the seeds of the measured time of a step.
        training_share: multiply-adds of the training / those of the dense baseline, see
            `sparse_export.train.cost.training_macs`; the mean over the seeds, as are the next two.
        mean_density: active / masked weights over all steps.
        explored: weights that were ever active / masked weights.
    """

    method: str
    pattern: str | None
    density: float | None
    setting: Setting
    n_cells: int
    n_complete: int
    test: Mean | None
    validation: Mean | None
    score_name: str
    is_share: bool
    higher_is_better: bool
    estimate_channels: float | None
    estimate_macs: float | None
    all_layers_estimate_channels: float | None
    all_layers_estimate_macs: float | None
    step_ms: float | None
    training_share: float | None = None
    mean_density: float | None = None
    explored: float | None = None

    @property
    def label(self) -> str:
        return heading(self.method, self.pattern, self.density) + setting_text(self.setting)


def rows_of(findings: Sequence[Finding]) -> list[Row]:
    """A row for each method, density and setting, in the order of the cells."""
    groups: dict[tuple[object, ...], list[Finding]] = {}
    for finding in findings:
        cell = finding.cell
        groups.setdefault((cell.method, cell.density, cell.setting), []).append(finding)
    return [_row(group) for group in groups.values()]


def _row(group: Sequence[Finding]) -> Row:
    cell = group[0].cell
    infos = [read_run_info(finding.run) for finding in group if finding.status == "complete"]

    def estimates(name: str) -> float | None:
        values = [getattr(info.speed, name) for info in infos if info.speed is not None]
        known = [value for value in values if value is not None]
        return fmean(known) if known else None

    def costs(name: str) -> float | None:
        values = [getattr(info.cost, name) for info in infos if info.cost is not None]
        known = [value for value in values if value is not None]
        return fmean(known) if known else None

    scores = [one for info in infos for one in (info.test, info.validation) if one is not None]
    known = scores[0] if scores else Score(name="", value=0.0, n_samples=1)
    steps = [info.speed.step_ms for info in infos if info.speed is not None]
    return Row(
        method=cell.method,
        pattern=cell.pattern,
        density=cell.density,
        setting=cell.setting,
        n_cells=len(group),
        n_complete=len(infos),
        test=_mean([info.test.figure for info in infos if info.test]),
        validation=_mean([info.validation.figure for info in infos if info.validation]),
        score_name=known.name,
        is_share=known.is_share,
        higher_is_better=known.higher_is_better,
        estimate_channels=estimates("estimate_channels"),
        estimate_macs=estimates("estimate_macs"),
        all_layers_estimate_channels=estimates("all_layers_estimate_channels"),
        all_layers_estimate_macs=estimates("all_layers_estimate_macs"),
        step_ms=median(steps) if steps else None,
        training_share=costs("macs_share"),
        mean_density=costs("mean_density"),
        explored=costs("explored"),
    )


def _mean(values: Sequence[float]) -> Mean | None:
    return mean_interval(values) if values else None


def share_text(value: float | None) -> str:
    """A share of 1, like `.0132`."""
    return "-" if value is None else f"{value:.3g}"


def ratio_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def score_name(rows: Sequence[Row]) -> str:
    """The score of all rows, like `accuracy %` or `RMSE`; `score` where rows have different ones, or none."""
    names = {f"{row.score_name}{' %' if row.is_share else ''}" for row in rows if row.score_name}
    return names.pop() if len(names) == 1 else "score"


def best_rows(rows: Sequence[Row], part: Part) -> set[int]:
    """Which of several sparse rows have the best mean of one score; none where they have different ones."""
    means = {at: mean.mean for at, row in enumerate(rows) if (mean := _of_sparse(row, part)) is not None}
    if len(means) < 2 or score_name(rows) == "score":
        return set()
    wanted = (max if _known(rows).higher_is_better else min)(means.values())
    return {at for at, mean in means.items() if mean == wanted}


def direction_text(rows: Sequence[Row], how: str) -> str:
    """Which score this is, and which way is better, as a sentence; empty where there is none.

    Args:
        rows: of the sweep.
        how: the best rows are marked, like `bold`.
    """
    if not any(row.score_name for row in rows):
        return ""
    if score_name(rows) == "score":
        return "The rows have different scores, so none is marked as the best."
    known = _known(rows)
    better = "higher" if known.higher_is_better else "lower"
    best = (
        f"; the best sparse mean is {how}" if best_rows(rows, "test") | best_rows(rows, "validation") else ""
    )
    return f"Of the {known.score_name} {better} is better{best}."


def _known(rows: Sequence[Row]) -> Row:
    return next(row for row in rows if row.score_name)


def _of_sparse(row: Row, part: Part) -> Mean | None:
    found: Mean | None = getattr(row, part)
    return None if row.method == DENSE else found


def shown(rows: Sequence[Row]) -> Shown:
    """The table for people."""
    name = score_name(rows)
    head = (
        "",
        "runs",
        f"test {name}",
        f"validation {name}",
        "training MACs",
        "mean density",
        "explored",
        "est. channels",
        "est. MACs",
        "step ms",
    )
    best = {"test": best_rows(rows, "test"), "validation": best_rows(rows, "validation")}
    cells = [
        _columns(row, *(" *" if at in best[part] else "" for part in ("test", "validation")))
        for at, row in enumerate(rows)
    ]
    direction = direction_text(rows, "marked by *")
    return Shown(
        [Table(head=head, rows=cells, right=range(1, len(head))), *([direction] if direction else [])]
    )


def _columns(row: Row, test: str, validation: str) -> tuple[str, ...]:
    """The cells of a row; the marks stand behind its scores."""
    return (
        row.label,
        f"{row.n_complete}/{row.n_cells}",
        mean_text(row.test, is_share=row.is_share) + test,
        mean_text(row.validation, is_share=row.is_share) + validation,
        share_text(row.training_share),
        share_text(row.mean_density),
        share_text(row.explored),
        ratio_text(row.estimate_channels),
        ratio_text(row.estimate_macs),
        "-" if row.step_ms is None else f"{row.step_ms:.3g}",
    )
