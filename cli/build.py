"""sparse-export build"""

from __future__ import annotations

from pathlib import Path

from sparse_export.cli._click import click
from sparse_export.cli._common import json_option, print_result


@click.command("build")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Bundle folder to write. Default: RUN-bundle.")
@click.option(
    "--target", "targets", multiple=True, default=("onnx",), show_default=True, help="What to build for."
)
@click.option(
    "--onnx",
    "form",
    type=click.Choice(["dense", "packed", "both"]),
    default="dense",
    show_default=True,
    help="How model.onnx stores 2:4 weights; both adds model-dense.onnx.",
)
@click.option(
    "--trust", metavar="SHA256", help="Allow the code that a run from elsewhere names, by its hash."
)
@json_option
def command(
    run: Path, out: Path | None, targets: tuple[str, ...], form: str, trust: str | None, as_json: bool
) -> None:
    """Export RUN to a bundle: ONNX, a golden input and output, a manifest with hashes.

    The file is run once and held against the network before it takes its name.
    """
    from dataclasses import asdict

    from sparse_export.building import build

    bundle = build(run, out, targets=targets, onnx=form, trust=trust)
    info = bundle.info
    sizes = [
        f"{name} {fact.size_bytes:,} bytes{' packed' if form != 'dense' and name == bundle.onnx_path.name else ''}"
        for name, fact in info.files.items()
        if name.endswith(".onnx")
    ]
    text = (
        f"{info.model.name}, {info.n_nonzero:,} of {info.n_parameters:,} parameters not zero, "
        f"ONNX opset {info.opset}\n{'; '.join(sizes)}\n{bundle.path}"
    )
    print_result({"bundle": str(bundle.path), "manifest": asdict(info)}, text, as_json)
