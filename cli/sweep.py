"""sparse-export sweep"""

from __future__ import annotations

import json
from pathlib import Path

from sparse_export.cli._click import click
from sparse_export.cli._common import (
    data_dir_option,
    device_option,
    download_option,
    json_option,
    print_result,
    say,
)


@click.command("sweep")
@click.argument("grid", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="GRID")
@click.option(
    "--from",
    "from_runs",
    is_flag=True,
    help="Train nothing: what follows are folders of runs, like runs/*, for the table and the page.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder to fill. Default: sweeps/GRID, with --from sweeps/runs.",
)
@click.option(
    "--jobs",
    type=click.IntRange(1),
    help="Runs at a time. Default: as many as there are cores, or CUDA devices.",
)
@click.option(
    "--cluster",
    metavar="dask:ADDRESS",
    help="Run the cells on the workers of a dask scheduler that is running.",
)
@data_dir_option
@download_option
@device_option
@json_option
def command(
    grid: tuple[Path, ...],
    from_runs: bool,
    out: Path | None,
    jobs: int | None,
    cluster: str | None,
    data_dir: Path | None,
    download: bool,
    device: str,
    as_json: bool,
) -> None:
    """Train methods x densities x seeds x settings by GRID, a TOML file: a table with intervals, and charts.

    Ctrl-C saves; the same command goes on. What is complete is not trained again. With --from runs that are
    there already are put into the table and the page.
    """
    if from_runs:
        for name, value in (("jobs", jobs), ("cluster", cluster)):
            if value is not None:
                raise click.UsageError(f"--from trains nothing: leave out --{name}.")
    elif len(grid) != 1:
        raise click.UsageError("One grid at a time; with --from any number of runs.")
    from sparse_export.sweep.sweep import PAGE_FILE, RESULTS_FILE, page_of_runs, sweep
    from sparse_export.sweep.table import shown

    out = out or Path("sweeps") / ("runs" if from_runs else grid[0].stem)
    if from_runs:
        result = page_of_runs(grid, out)
    else:
        result = sweep(
            grid[0],
            out,
            n_jobs=jobs,
            data_dir=data_dir,
            download=download,
            device=device,
            cluster=cluster,
            say=say,
        )
    report = out / PAGE_FILE
    document = {"sweep": str(out), "report": str(report), **json.loads((out / RESULTS_FILE).read_text())}
    print_result(document, shown(result.rows), as_json, path=report)
