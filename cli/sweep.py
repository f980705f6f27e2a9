"""sparse-export sweep"""

from __future__ import annotations

import json
from pathlib import Path

from sparse_export.cli._click import click
from sparse_export.cli._common import json_option, print_result, say


@click.command("sweep")
@click.argument("grid", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder to fill. Default: sweeps/GRID.")
@click.option(
    "--jobs",
    type=click.IntRange(1),
    help="Runs at a time. Default: as many as there are cores, or CUDA devices.",
)
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where the data sets lie.")
@click.option("--download", is_flag=True, help="Fetch the data set when it is not there.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
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
    from sparse_export.sweep.table import table_text

    out = out or Path("sweeps") / grid.stem
    result = sweep(grid, out, n_jobs=jobs, data_dir=data_dir, download=download, device=device, say=say)
    report = out / PAGE_FILE
    document = {"sweep": str(out), "report": str(report), **json.loads((out / RESULTS_FILE).read_text())}
    print_result(document, f"{table_text(result.rows)}\n{report}", as_json)
