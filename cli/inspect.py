"""sparse-export inspect"""

from __future__ import annotations

from pathlib import Path

from sparse_export.cli._click import click
from sparse_export.cli._common import json_option, print_result


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--trt-log",
    type=click.Path(path_type=Path),
    help="Verbose log of TensorRT's build of this graph elsewhere: say of each layer whether it got a sparse "
    "kernel, and the likely reason where not.",
)
@click.option(
    "--trt-layers",
    type=click.Path(path_type=Path),
    help="Layers of that engine, as JSON of trtexec --exportLayerInfo or the engine inspector.",
)
@json_option
def command(path: Path, trt_log: Path | None, trt_layers: Path | None, as_json: bool) -> None:
    """Show what a run, a bundle, an .onnx file or an engine holds, layer by layer.

    Of a graph also which layers are 2:4, whether hardware can use that, and why not. A run or a bundle with a
    file that is missing or was changed ends with 6, a bundle whose graph breaks a pattern that its manifest
    promises with 3.
    """
    from dataclasses import asdict

    from sparse_export.inspect import inspect
    from sparse_export.inspection import require_promises, require_unchanged

    inspection = inspect(path, trt_log=trt_log, trt_layers=trt_layers)
    print_result(asdict(inspection), inspection.shown(), as_json)
    require_unchanged(inspection)  # a changed file can break promises that were kept
    require_promises(inspection)
