"""sparse-export demo"""

from __future__ import annotations

from pathlib import Path

from sparse_export.cli._click import click
from sparse_export.cli._common import json_option, print_result, say


@click.command("demo")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="Folder to fill."
)
@json_option
def command(out: Path, as_json: bool) -> None:
    """Train dense, sparse and 2:4, build, validate and compare, on data that is embedded.

    A minute on two cores.
    """
    from dataclasses import asdict

    from sparse_export.cli._demo_run import demo
    from sparse_export.cli._progress import round_observer, training_observer
    from sparse_export.report.verdict import verdict
    from sparse_export.tables import Shown, Table

    made = demo(out, observe=training_observer, observe_rounds=round_observer, say=say)
    shown = Shown([])
    for kind, validation in made.validations.items():
        shown += Shown([f"{kind}, PyTorch against the ONNX file:"]) + validation.shown()
    for comparison in made.comparisons.values():
        shown += Shown([verdict(comparison)]) + comparison.shown()
    files = [("Runs, bundles and raw measurements", str(out)), ("Results", str(made.results))]
    files += [(f"Report to open in a browser, {kind}", str(path)) for kind, path in made.reports.items()]
    shown += Shown([Table(rows=files)])
    document = {
        "bundles": {kind: str(bundle.path) for kind, bundle in made.bundles.items()},
        "results": str(made.results),
        "reports": {kind: str(path) for kind, path in made.reports.items()},
        "comparisons": {kind: asdict(comparison) for kind, comparison in made.comparisons.items()},
    }
    print_result(document, shown, as_json)
