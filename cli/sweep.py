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
@click.argument("grid", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder to fill. Default: sweeps/GRID.")
@click.option(
    "--jobs",
    type=click.IntRange(1),
    help="Runs at a time. Default: as many as there are cores, or CUDA devices.",
)
@data_dir_option
@download_option
@device_option
@json_option
def command(
    grid: Path,
    out: Path | None,
    jobs: int | None,
    data_dir: Path | None,
    download: bool,
    device: str,
    as_json: bool,
) -> None:
    """Train methods x densities x seeds x settings by GRID, a TOML file: a table with intervals, and charts.

    Ctrl-C saves; the same command goes on. What is complete is not trained again.
    """
    from sparse_export.sweep.sweep import PAGE_FILE, RESULTS_FILE, sweep
    from sparse_export.sweep.table import shown

    out = out or Path("sweeps") / grid.stem
    result = sweep(grid, out, n_jobs=jobs, data_dir=data_dir, download=download, device=device, say=say)
    report = out / PAGE_FILE
    document = {"sweep": str(out), "report": str(report), **json.loads((out / RESULTS_FILE).read_text())}
    print_result(document, shown(result.rows), as_json, path=report)
