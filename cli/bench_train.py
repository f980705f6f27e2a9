"""sparse-export bench-train"""

from __future__ import annotations

from pathlib import Path

from sparse_export.cli._click import click
from sparse_export.cli._common import (
    device_option,
    json_option,
    results_option,
    say,
    showing,
    speedup_option,
    whole_numbers,
)


@click.command("bench-train")
@click.argument("recipe")
@speedup_option
@click.option(
    "--batch", "batch_size", type=click.IntRange(min=1), help="Samples of a step. Default: the recipe's."
)
@click.option(
    "--input-shape",
    callback=lambda context, option, text: text and whole_numbers(context, option, text),
    metavar="SIZES",
    help="Of one sample, like 3,32,32; for a factory of one's own. Default: what own data tell.",
)
@click.option(
    "--update-every",
    type=click.IntRange(min=1),
    help="Steps that share a mask update. Default: the recipe's, or 500.",
)
@click.option(
    "--rounds", type=int, default=24, show_default=True, help="Interleaved rounds of blocks of steps."
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="Of torch on the CPU. Default: as training has them."
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Of weights, masks, inputs and the order of the blocks.",
)
@device_option
@results_option("bench-train.json")
@json_option
def command(
    recipe: str,
    require_speedup: float | None,
    batch_size: int | None,
    input_shape: tuple[int, ...] | None,
    update_every: int | None,
    rounds: int,
    threads: int | None,
    seed: int,
    device: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Time a training step of RECIPE, dense against sparse, in all its parts.

    On random inputs: no data set is needed, and reading data is no part of what is timed. Of a factory
    whose inputs nothing else tells, as of one with several, samples of the recipe's own data are taken.
    """
    from dataclasses import asdict

    from sparse_export.evaluate.bench_train import bench_training_step
    from sparse_export.evaluate.training_step import check_speedup, write_step_bench
    from sparse_export.files import require_writable

    if out is not None:
        require_writable(out)
    result = bench_training_step(
        recipe,
        rounds=rounds,
        device=device,
        batch_size=batch_size,
        input_shape=input_shape,
        update_every=update_every,
        n_threads=threads,
        seed=seed,
        require_speedup=require_speedup,
        on_progress=say,
    )
    with showing(asdict(result), result.shown(), as_json):
        if out is not None:
            say(f"wrote {write_step_bench(out, result)}")
    check_speedup(result)
