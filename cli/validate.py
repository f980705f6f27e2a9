"""sparse-export validate"""

from __future__ import annotations

from pathlib import Path

from sparse_export.cli._click import click
from sparse_export.cli._common import json_option, print_result, say


@click.command("validate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where the data sets lie.")
@click.option(
    "--run", type=click.Path(path_type=Path), help="The run it was built from, when it was moved since."
)
@click.option(
    "--max-drop", type=float, metavar="POINTS", help="Percentage points of accuracy that may be lost."
)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    help="Dense bundle to count the drop from.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="Threads inside an operator. Default: one a core."
)
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    metavar="NAME",
    help="Runtime besides onnxruntime-cpu. Default: those of its engines that work here.",
)
@click.option("--out", type=click.Path(path_type=Path), metavar="FOLDER", help="Write validation.json there.")
@click.option(
    "--trust",
    multiple=True,
    metavar="SHA256",
    help="Allow the code of a run, or the files of a bundle, from elsewhere, by its hash; may be repeated.",
)
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

    from sparse_export.evaluate.validation import check_gates, validate, write_results
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
    print_result(asdict(validation), str(validation), as_json)
    check_gates(validation)
