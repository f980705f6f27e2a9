"""sparse-export validate"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparse_export.cli._click import click
from sparse_export.cli._common import (
    axes_option,
    bundle_there,
    data_dir_option,
    inputs_option,
    json_option,
    max_drop_help,
    results_option,
    run_option,
    say,
    score_options,
    showing,
    sizes_option,
    threads_option,
    trust_option,
)
from sparse_export.cli._pictures import picture_options

if TYPE_CHECKING:
    from sparse_export.tasks.data.picture_settings import PictureSettings


@click.command("validate")
@click.argument("bundle", type=click.Path(path_type=Path), callback=bundle_there)
@score_options
@data_dir_option
@picture_options
@run_option
@click.option("--max-drop", metavar="AMOUNT", help=max_drop_help)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    callback=bundle_there,
    metavar="BUNDLE",
    help="Dense bundle, or ONNX file, to count the drop from.",
)
@inputs_option
@axes_option
@sizes_option
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
    task: str | None,
    data: str | None,
    data_dir: Path | None,
    pictures: PictureSettings | None,
    run: Path | None,
    max_drop: str | None,
    against: Path | None,
    inputs: Path | None,
    axes: tuple[str, ...],
    sizes: tuple[str, ...],
    threads: int | None,
    runtimes: tuple[str, ...],
    out: Path | None,
    trust: tuple[str, ...],
    as_json: bool,
) -> None:
    """Check that BUNDLE, or an ONNX file, computes what was trained, and as well.

    Files by their hashes, the ONNX file on the golden input and against its network, its score on the test
    set; without targets how far its outputs agree with those of a dense bundle, on --inputs.
    """
    import contextlib
    from dataclasses import asdict

    from sparse_export.building.from_source import bundle_at, require_file_for
    from sparse_export.evaluate.validate import validate
    from sparse_export.evaluate.validation import check_gates, write_results
    from sparse_export.files import require_writable
    from sparse_export.formats.bundle import open_bundle
    from sparse_export.oneshot.graph_source import Told

    told = Told(axes=axes, sizes=sizes, inputs=inputs)
    require_file_for(told, [bundle, *([] if against is None else [against])])
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(bundle_at(bundle, told))
        dense = None if against is None else stack.enter_context(bundle_at(against, told))
        if out is not None:
            for path in (opened, dense):  # first, so that no empty folder tells of a bundle that is not there
                if path is not None:
                    open_bundle(path)
            require_writable(out)
        validation = validate(
            opened,
            task=task,
            data=data,
            data_dir=data_dir,
            pictures=pictures,
            run=run,
            max_drop=max_drop,
            against=dense,
            inputs=inputs,
            n_threads=threads,
            runtimes=runtimes or None,
            trust=trust,
        )
    with showing(asdict(validation), validation.shown(), as_json):
        if out is not None:
            say(f"wrote {write_results(out, validation)}")
    check_gates(validation)
