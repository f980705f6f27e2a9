"""What the complete cells of a grid came to: a row for each method, density and setting, over its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from sparse_export.formats.run import read_run_info
from sparse_export.instruments.statistics import Mean, mean_interval
from sparse_export.sweep.run_list import Setting, heading, setting_text
from sparse_export.sweep.running import Finding
from sparse_export.tables import Shown, Table
from sparse_export.tasks.scores import mean_percent_text


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one method came to at one density and setting, over its seeds.

    The estimates are means over the seeds, see `sparse_export.formats.run.SpeedInfo`.

    Attributes:
        test, validation: scores over the seeds, shares in percent; None without such a part or a complete
            cell.
        step_ms: median over the seeds of the measured time of a step.
    """

    method: str
    pattern: str | None
    density: float | None
    setting: Setting
    n_cells: int
    n_complete: int
    test: Mean | None
    validation: Mean | None
    estimate_channels: float | None
    estimate_macs: float | None
    all_layers_estimate_channels: float | None
    all_layers_estimate_macs: float | None
    step_ms: float | None

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
        estimate_channels=estimates("estimate_channels"),
        estimate_macs=estimates("estimate_macs"),
        all_layers_estimate_channels=estimates("all_layers_estimate_channels"),
        all_layers_estimate_macs=estimates("all_layers_estimate_macs"),
        step_ms=median(steps) if steps else None,
    )


def _mean(values: Sequence[float]) -> Mean | None:
    return mean_interval(values) if values else None


def ratio_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def shown(rows: Sequence[Row]) -> Shown:
    """The table for people."""
    head = ("", "runs", "test %", "validation %", "est. channels", "est. MACs", "step ms")
    return Shown([Table(head=head, rows=[_columns(row) for row in rows], right=range(1, len(head)))])


def _columns(row: Row) -> tuple[str, ...]:
    return (
        row.label,
        f"{row.n_complete}/{row.n_cells}",
        mean_percent_text(row.test),
        mean_percent_text(row.validation),
        ratio_text(row.estimate_channels),
        ratio_text(row.estimate_macs),
        "-" if row.step_ms is None else f"{row.step_ms:.3g}",
    )
