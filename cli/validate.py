"""sparse-export validate"""

from __future__ import annotations

from pathlib import Path

from sparse_export.cli._click import click
from sparse_export.cli._common import (
    data_dir_option,
    json_option,
    print_result,
    results_option,
    run_option,
    say,
    threads_option,
    trust_option,
)


@click.command("validate")
@click.argument("bundle", type=click.Path(path_type=Path))
@data_dir_option
@run_option
@click.option(
    "--max-drop", type=float, metavar="POINTS", help="Percentage points of accuracy that may be lost."
)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    help="Dense bundle to count the drop from.",
)
@threads_option
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    metavar="NAME",
    help="Runtime besides onnxruntime-cpu. Default: those of its engines that work here.",
)
@results_option("validation.json")
@trust_option
@json_option
def command(
    bundle: Path,
    data_dir: Path | None,
    run: Path | None,
    max_drop: float | None,
    against: Path | None,
    threads: int | None,
    runtimes: tuple[str, ...],
    out: Path | None,
    trust: tuple[str, ...],
    as_json: bool,
) -> None:
    """Check that BUNDLE computes what was trained, and as well.

    Files by their hashes, the ONNX file on the golden input and against PyTorch, accuracy on the test set.
    """
    from dataclasses import asdict

    from sparse_export.evaluate.validate import validate
    from sparse_export.evaluate.validation import check_gates, write_results
    from sparse_export.files import require_writable
    from sparse_export.formats.bundle import open_bundle

    if out is not None:
        for path in (bundle, against):  # first, so that no empty folder tells of a bundle that is not there
            if path is not None:
                open_bundle(path)
        require_writable(out)
    validation = validate(
        bundle,
        data_dir=data_dir,
        run=run,
        max_drop=max_drop,
        against=against,
        n_threads=threads,
        runtimes=runtimes or None,
        trust=trust,
    )
    if out is not None:
        say(f"wrote {write_results(out, validation)}")
    print_result(asdict(validation), validation.shown(), as_json)
    check_gates(validation)
