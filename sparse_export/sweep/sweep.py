"""One sweep from its grid to its table and page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparse_export.errors import (
    Interrupted,
    MissingCapability,
    SparseExportError,
    UsageError,
)
from sparse_export.files import claimed, json_bytes, remove_leftovers, require_writable, write_bytes
from sparse_export.formats.run import read_run_info
from sparse_export.instruments.machine import machine_facts
from sparse_export.sweep.dask_place import dask_cluster, n_dask_threads
from sparse_export.sweep.from_runs import findings_of, varied_keys
from sparse_export.sweep.grid import load_grid
from sparse_export.sweep.page import Source, page
from sparse_export.sweep.run_list import cells_of
from sparse_export.sweep.running import Finding, default_jobs, run_cells
from sparse_export.sweep.table import Row, rows_of
from sparse_export.version import command_line, library_versions, now

RESULTS_FILE = "results.json"
PAGE_FILE = "report.html"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a sweep left behind. rows: the table.  findings: how each cell stands."""

    path: Path
    rows: list[Row]
    findings: list[Finding]


def sweep(
    grid_file: str | Path,
    out: str | Path,
    *,
    n_jobs: int | None = None,
    data_dir: Path | None = None,
    download: bool = False,
    device: str = "auto",
    cluster: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Sweep:
    """Train every cell of a grid that is not complete in `out` yet, and write `results.json` and
    `report.html` there.

    n_jobs: processes at a time; by default as many as the machine has cores for, or CUDA devices, and of a
    cluster as many as its workers have threads.  cluster: `dask:ADDRESS` of a scheduler whose workers run the
    cells; None for this machine.
    What is complete is not trained again, also where an earlier version named it otherwise; what was stopped
    goes on. The two files are written of what there is, also when cells fail or the sweep is stopped. One
    process at a time sweeps into a folder. Raises RecipeError and UsageError for a grid before anything is
    trained, FolderInUse, OutputError, Interrupted on SIGINT or SIGTERM, and at the end, when a cell failed,
    SparseExportError, or MissingCapability where every cell would have failed by lack of a data set, a device
    or a library; the others are then not tried.
    """
    grid_file, out = Path(grid_file), Path(out)
    grid = load_grid(grid_file)
    cells = cells_of(grid, grid_file.parent)
    if n_jobs is not None and n_jobs < 1:
        raise UsageError(f"n_jobs is {n_jobs}.", expected="A number of processes, 1 or more, was expected.")
    with claimed(out):
        require_writable(out)
        for place in (out, out / "jobs"):
            remove_leftovers(place)
        with nullcontext() if cluster is None else dask_cluster(cluster) as workers:
            n_most = default_jobs(cells, device) if workers is None else n_dask_threads(workers)
            n_jobs = min(n_jobs or n_most, len(cells))
            say(f"{len(cells)} runs, {n_jobs} at a time, in {out}")
            findings, stopped = run_cells(
                cells,
                out.absolute(),
                n_jobs=n_jobs,
                data_dir=data_dir.absolute() if data_dir else None,
                download=download,
                device=device,
                place=workers,
                say=say,
            )
        source = Source(
            title=f"Sweep of {grid.recipe or grid.program}",
            varied=list(grid.vary),
            heading="The grid",
            text=grid_file.read_text(),
        )
        result = _written(out, findings, source, n_jobs=n_jobs)
        if stopped:
            n_left = sum(finding.status != "complete" for finding in findings)
            raise Interrupted(
                f"Stopped with {n_left} of {len(cells)} runs to go; nothing is lost.",
                do="Go on with the same command.",
            )
        failed = [finding for finding in findings if finding.status == "failed"]
        if failed:
            lacking = [finding for finding in failed if finding.exit_code == MissingCapability.exit_code]
            told = (lacking or failed)[0]
            raise (MissingCapability if lacking else SparseExportError)(
                f"{len(failed)} of {len(cells)} runs failed. One of them, {told.cell.name}: {told.reason}",
                do=f"Read their logs in {out / 'logs'}, then give the same command to try them again. "
                f"{out / RESULTS_FILE} has the runs that ended well.",
            )
        return result


def page_of_runs(runs: Sequence[str | Path], out: str | Path) -> Sweep:
    """Write `results.json` and `report.html` of runs that are there, whoever trained them; trains nothing.

    runs: their folders, told apart by method, density, seed and whatever their recipes differ in.  out:
    folder for the two files.  Raises UsageError for two runs of the same seed and settings, and ArtefactError
    for what is no run.
    """
    out = Path(out)
    findings = findings_of([Path(run) for run in runs])
    with claimed(out):
        require_writable(out)
        source = Source(
            title=f"{len(findings)} runs",
            varied=varied_keys(findings),
            heading="The runs",
            text="\n".join(str(finding.run) for finding in findings),
        )
        return _written(out, findings, source, n_jobs=None)


def _written(out: Path, findings: list[Finding], source: Source, *, n_jobs: int | None) -> Sweep:
    """Write the table and the page of what was found."""
    result = Sweep(path=out, rows=rows_of(findings), findings=findings)
    document = document_of(result, n_jobs=n_jobs)
    write_bytes(out / RESULTS_FILE, json_bytes(document))
    facts = f"Written {document['created']}"
    if n_jobs is not None:
        facts += (
            f"; {n_jobs} at a time on {document['machine']['cpu_model']}, "
            f"{document['machine']['n_cores_usable']} cores; torch {document['versions'].get('torch')}"
        )
    write_bytes(out / PAGE_FILE, page(source, findings, result.rows, f"{facts}.").encode())
    return result


def document_of(result: Sweep, *, n_jobs: int | None) -> dict[str, Any]:
    """The content of `results.json`: the rows, and every run behind them."""
    runs = []
    for finding in result.findings:
        cell = finding.cell
        entry: dict[str, Any] = {
            "cell": cell.name,
            "method": cell.method,
            "pattern": cell.pattern,
            "density": cell.density,
            "seed": cell.seed,
            "setting": dict(cell.setting),
            "status": finding.status,
        }
        if finding.status == "complete":
            info = read_run_info(finding.run)
            entry |= {
                "run": _place(finding.run, result.path),
                "test_percent": info.test.figure if info.test and info.test.is_share else None,
                "test_score": info.test.figure if info.test else None,
                "score_name": next((one.name for one in (info.test, info.validation) if one), None),
                "validation_score": info.validation.figure if info.validation else None,
                "n_active": info.n_active,
                "n_masked": info.n_masked,
                "epochs": info.epochs,
                "seconds": info.seconds,
                "device": info.device,
                "n_threads": info.n_threads,
                "speed": asdict(info.speed) if info.speed else None,
                "cost": asdict(info.cost) if info.cost else None,
            }
        elif finding.reason:
            entry["reason"] = finding.reason
        runs.append(entry)
    return {
        "created": now(),
        "command": list(command_line()),
        "n_jobs": n_jobs,
        "machine": machine_facts(),
        "versions": library_versions(),
        "rows": [{**asdict(row), "setting": dict(row.setting)} for row in result.rows],
        "runs": runs,
    }


def _place(run: Path, folder: Path) -> str:
    """Where a run is, below the sweep's folder where it is there."""
    inside = folder.absolute()
    return str(run.relative_to(inside) if run.is_relative_to(inside) else run)
