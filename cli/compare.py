"""sparse-export compare"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparse_export.cli._click import click
from sparse_export.cli._common import (
    axes_option,
    batches_option,
    comparison_options,
    cuda_graphs_option,
    data_dir_option,
    inputs_option,
    json_option,
    max_drop_help,
    require_bundles,
    results_option,
    say,
    score_options,
    showing,
    sizes_option,
    speedup_option,
)
from sparse_export.cli._pictures import picture_options

if TYPE_CHECKING:
    from sparse_export.formats.bundle import Bundle
    from sparse_export.tasks.data.picture_settings import PictureSettings
    from sparse_export.tasks.samples import LabelledSamples


@click.command("compare")
@click.argument("dense", type=click.Path(path_type=Path))
@click.argument(
    "sparse",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path),
    metavar="SPARSE...",
)
@click.option("--max-drop", metavar="AMOUNT", help=max_drop_help)
@speedup_option
@batches_option("1,32")
@comparison_options
@click.option(
    "--runtime",
    metavar="NAME",
    help=(
        "tensorrt, tensorrt-rtx, onnxruntime-tensorrt, -cuda or -cpu. Default: the best that runs both here."
    ),
)
@click.option(
    "--trust",
    multiple=True,
    metavar="SHA256",
    help="Allow the files of a bundle from elsewhere, by its hash; may be repeated.",
)
@cuda_graphs_option
@score_options
@data_dir_option
@picture_options
@inputs_option
@axes_option
@sizes_option
@results_option("comparison.json")
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a page with pictures there, which needs no network.",
)
@json_option
def command(
    dense: Path,
    sparse: tuple[Path, ...],
    max_drop: str | None,
    require_speedup: float | None,
    batches: tuple[int, ...],
    rounds: int,
    budget: float,
    threads: int | None,
    seed: int,
    runtime: str | None,
    trust: tuple[str, ...],
    cuda_graphs: bool,
    task: str | None,
    data: str | None,
    data_dir: Path | None,
    pictures: PictureSettings | None,
    inputs: Path | None,
    axes: tuple[str, ...],
    sizes: tuple[str, ...],
    out: Path | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Compare a dense with a sparse bundle: score, size and time, with intervals.

    Several sparse bundles are compared with the dense one in turn: one table, and one page.
    The score is measured on the test set; where that is not found, the recorded scores are compared, if any.
    """
    import contextlib
    import functools
    from dataclasses import asdict

    from sparse_export.errors import UsageError

    if html is not None and html.is_dir():
        raise UsageError(f"--html {html} is a folder.", do=f"Name a file, such as {html / 'report.html'}.")
    require_bundles(dense, *sparse)  # before the imports that take seconds

    from sparse_export import report
    from sparse_export.building.from_source import bundle_at, require_file_for
    from sparse_export.cli._progress import round_observer
    from sparse_export.evaluate import candidates
    from sparse_export.evaluate.candidates import compare_candidates
    from sparse_export.evaluate.compare import compare
    from sparse_export.evaluate.comparison import check_gates, write_results
    from sparse_export.evaluate.test_set import judge_of
    from sparse_export.files import require_writable
    from sparse_export.formats.bundle import open_bundle
    from sparse_export.oneshot.graph_source import Told
    from sparse_export.report.verdict import verdict
    from sparse_export.tables import Shown

    told = Told(axes=axes, sizes=sizes, inputs=inputs)
    require_file_for(told, (dense, *sparse))
    with contextlib.ExitStack() as stack:
        paths = [stack.enter_context(bundle_at(side, told)) for side in (dense, *sparse)]
        first, *others = [open_bundle(path) for path in paths]
        for folder in (out, None if html is None else html.parent):
            if folder is not None:
                require_writable(folder)
        with round_observer() as on_round:
            call = functools.partial(
                compare,
                batches=batches,
                rounds=rounds,
                budget_s=budget,
                n_threads=threads,
                seed=seed,
                samples=_test_set(first, task, data, data_dir, trust, pictures),
                inputs=inputs,
                judge=judge_of(first, task, data),
                max_drop=max_drop,
                require_speedup=require_speedup,
                runtime=runtime,
                trust=trust,
                cuda_graphs=cuda_graphs,
                on_progress=say,
                on_round=on_round,
            )
            if len(others) > 1:
                several = compare_candidates(first, others, call, runtime=runtime, on_progress=say)
            else:
                comparison = call(first, others[0])
        if len(others) > 1:
            with showing(several.document, several.shown(), as_json):
                if out is not None:
                    say(f"wrote {candidates.write_results(out, several)}")
                if html is not None:
                    say(f"wrote {report.write_candidates_report(html, several, first, others)}")
            candidates.check_gates(several)
            return
        shown = Shown([verdict(comparison)]) + comparison.shown()
        with showing(asdict(comparison), shown, as_json):
            if out is not None:
                say(f"wrote {write_results(out, comparison)}")
            if html is not None:
                say(f"wrote {report.write_report(html, comparison, first, others[0])}")
    check_gates(comparison)


def _test_set(
    dense: Bundle,
    task: str | None,
    data: str | None,
    data_dir: Path | None,
    trust: tuple[str, ...],
    pictures: PictureSettings | None,
) -> LabelledSamples | None:
    """The samples that both are scored on, or None, said aloud, where they cannot be had."""
    from sparse_export.errors import DataNotFound
    from sparse_export.evaluate.test_set import test_set_of

    try:
        return test_set_of(dense, task=task, data=data, data_dir=data_dir, trust=trust, pictures=pictures)
    except DataNotFound as cause:
        if data is not None:
            raise
        say(f"{cause} Comparing the recorded scores.")
        return None
