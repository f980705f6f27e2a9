"""sparse-export bench"""

from __future__ import annotations

from pathlib import Path

from sparse_export.cli._click import click
from sparse_export.cli._common import json_option, print_result, say, timing_options, whole_numbers


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--batch",
    "batches",
    callback=whole_numbers,
    metavar="SIZES",
    default="1,8,32,128",
    show_default=True,
    help="Samples in a timed call.",
)
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    metavar="NAME",
    help="tensorrt, tensorrt-rtx, onnxruntime-tensorrt, -cuda or -cpu; may be repeated. Default: all that can run here.",
)
@click.option("--cuda-graphs", is_flag=True, help="Let engines replay their launches as CUDA graphs.")
@timing_options
@click.option("--trust", metavar="SHA256", help="Allow the files of a bundle from elsewhere, by its hash.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FOLDER", help="Write bench.json there.")
@json_option
def command(
    bundle: Path,
    batches: tuple[int, ...],
    runtimes: tuple[str, ...],
    cuda_graphs: bool,
    rounds: int,
    threads: int | None,
    seed: int,
    trust: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Time BUNDLE: latency percentiles and throughput on each runtime, at several batch sizes.

    With fewer threads than cores, they are held to as many cores.
    """
    from dataclasses import asdict

    from sparse_export.evaluate.bench.latency import bench, write_bench
    from sparse_export.files import require_writable

    if out is not None:
        require_writable(out)
    result = bench(
        bundle,
        batches=batches,
        runtimes=runtimes,
        rounds=rounds,
        n_threads=threads,
        seed=seed,
        trust=trust,
        cuda_graphs=cuda_graphs,
        on_progress=say,
    )
    if out is not None:
        say(f"wrote {write_bench(out, result)}")
    print_result(asdict(result), str(result), as_json)
