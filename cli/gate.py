"""sparse-export gate"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparse_export.cli._click import click
from sparse_export.cli._common import (
    batches_option,
    bundle_there,
    comparison_options,
    data_dir_option,
    inputs_option,
    json_option,
    max_drop_help,
    results_option,
    run_option,
    say,
    score_options,
    showing,
    trust_option,
)
from sparse_export.cli._pictures import picture_options

if TYPE_CHECKING:
    from sparse_export.tasks.data.picture_settings import PictureSettings


@click.command("gate")
@click.argument("bundle", type=click.Path(path_type=Path), callback=bundle_there)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    callback=bundle_there,
    metavar="BUNDLE",
    required=True,
    help="Dense bundle of the same data that score and speed are held against.",
)
@click.option(
    "--max-drop",
    metavar="AMOUNT",
    default="1",
    show_default=True,
    help=max_drop_help,
)
@click.option(
    "--require-speedup",
    type=float,
    metavar="RATIO",
    help="Speed-up that is promised, at the low end of its interval. Without it none is measured.",
)
@batches_option("1,32")
@comparison_options
@score_options
@data_dir_option
@picture_options
@inputs_option
@run_option
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    metavar="NAME",
    help="Runtime besides onnxruntime-cpu that has to run it. Default: those of its engines that work here.",
)
@trust_option
@results_option("gate.json and gate.junit.xml")
@json_option
def command(
    bundle: Path,
    against: Path,
    max_drop: str,
    require_speedup: float | None,
    batches: tuple[int, ...],
    rounds: int,
    budget: float,
    threads: int | None,
    seed: int,
    task: str | None,
    data: str | None,
    data_dir: Path | None,
    pictures: PictureSettings | None,
    inputs: Path | None,
    run: Path | None,
    runtimes: tuple[str, ...],
    trust: tuple[str, ...],
    out: Path | None,
    as_json: bool,
) -> None:
    """Hold BUNDLE to all that deploying it rests on: files, weights, graph, engines, score, speed.

    One link after the other, up to the first that is broken; that one decides the exit code.
    """
    import contextlib
    from dataclasses import asdict

    from sparse_export.cli._progress import round_observer
    from sparse_export.errors import ArtefactError
    from sparse_export.evaluate.gate import check_gate, gate, write_results
    from sparse_export.files import require_writable
    from sparse_export.formats.bundle import read_bundle_info

    if out is not None:
        for path in (bundle, against):  # first, so that no empty folder tells of a bundle that is not there
            with contextlib.suppress(ArtefactError):  # a damaged one is a finding of the gate
                read_bundle_info(path)
        require_writable(out)
    with round_observer() as on_round:
        found = gate(
            bundle,
            against,
            max_drop=max_drop,
            require_speedup=require_speedup,
            batches=batches,
            rounds=rounds,
            budget_s=budget,
            n_threads=threads,
            seed=seed,
            task=task,
            data=data,
            data_dir=data_dir,
            pictures=pictures,
            inputs=inputs,
            run=run,
            runtimes=runtimes or None,
            trust=trust,
            on_progress=say,
            on_round=on_round,
        )
    with showing(asdict(found), found.shown(), as_json):
        if out is not None:
            for path in write_results(out, found):
                say(f"wrote {path}")
    check_gate(found)
