"""sparse-export bench"""

from __future__ import annotations

from pathlib import Path

from sparse_export.cli._click import click
from sparse_export.cli._common import (
    axes_option,
    batches_option,
    bundle_there,
    cuda_graphs_option,
    inputs_option,
    json_option,
    results_option,
    say,
    showing,
    sizes_option,
    timing_options,
)


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path), callback=bundle_there)
@batches_option("1,8,32,128")
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    metavar="NAME",
    help=(
        "tensorrt, tensorrt-rtx, onnxruntime-tensorrt, -cuda or -cpu; may be repeated. Default: all "
        "that can run here."
    ),
)
@cuda_graphs_option
@timing_options
@inputs_option
@axes_option
@sizes_option
@click.option("--trust", metavar="SHA256", help="Allow the files of a bundle from elsewhere, by its hash.")
@results_option("bench.json")
@json_option
def command(
    bundle: Path,
    batches: tuple[int, ...],
    runtimes: tuple[str, ...],
    cuda_graphs: bool,
    rounds: int,
    threads: int | None,
    seed: int,
    inputs: Path | None,
    axes: tuple[str, ...],
    sizes: tuple[str, ...],
    trust: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Time BUNDLE, or an ONNX file: latency percentiles and throughput, on each runtime, at several batches.

    With fewer threads than cores, they are held to as many cores.
    """
    from dataclasses import asdict

    from sparse_export.building.from_source import bundle_at, require_file_for
    from sparse_export.evaluate.bench import bench
    from sparse_export.evaluate.latency import write_bench
    from sparse_export.files import require_writable
    from sparse_export.oneshot.graph_source import Told

    if out is not None:
        require_writable(out)
    told = Told(axes=axes, sizes=sizes, inputs=inputs)
    require_file_for(told, [bundle])
    with bundle_at(bundle, told) as path:
        result = bench(
            path,
            batches=batches,
            runtimes=runtimes,
            rounds=rounds,
            n_threads=threads,
            seed=seed,
            trust=trust,
            cuda_graphs=cuda_graphs,
            on_progress=say,
        )
    with showing(asdict(result), result.shown(), as_json):
        if out is not None:
            say(f"wrote {write_bench(out, result)}")
