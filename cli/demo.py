"""sparse-export demo"""

from __future__ import annotations

import sys
from pathlib import Path

from sparse_export.cli._click import click
from sparse_export.cli._common import json_option, print_result


@click.command("demo")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="Folder to fill."
)
@json_option
def command(out: Path, as_json: bool) -> None:
    """Train dense and sparse, build, validate and compare, on data that is embedded. Half a minute on two cores."""
    from dataclasses import asdict

    from sparse_export.cli._progress import training_observer
    from sparse_export.demo import demo

    made = demo(out, observe=training_observer, say=lambda text: print(text, file=sys.stderr, flush=True))
    parts = [
        "Dense, PyTorch against the ONNX file:",
        str(made.dense_validation),
        "",
        "Sparse, PyTorch against the ONNX file:",
        str(made.sparse_validation),
        "",
        str(made.comparison),
        "",
        f"Runs, bundles and raw measurements: {out}",
        f"Results: {made.results}",
    ]
    document = {
        "dense": str(made.dense.path),
        "sparse": str(made.sparse.path),
        "results": str(made.results),
        "comparison": asdict(made.comparison),
    }
    print_result(document, "\n".join(parts), as_json)
