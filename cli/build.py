"""sparse-export build"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparse_export.cli._click import click
from sparse_export.cli._common import json_option, print_result

if TYPE_CHECKING:
    from sparse_export.artefact import CompactFact


@click.command("build")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Bundle folder to write. Default: RUN-bundle.")
@click.option(
    "--target", "targets", multiple=True, default=("onnx",), show_default=True, help="What to build for."
)
@click.option("--compact", is_flag=True, help="Take the channels that do nothing out of the graph.")
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
    run: Path,
    out: Path | None,
    targets: tuple[str, ...],
    compact: bool,
    form: str,
    trust: str | None,
    as_json: bool,
) -> None:
    """Export RUN to a bundle: ONNX, a golden input and output, a manifest with hashes.

    The file is run once and held against the network before it takes its name.
    """
    from dataclasses import asdict

    from sparse_export.building import build

    bundle = build(run, out, targets=targets, compact=compact, onnx=form, trust=trust)
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
    if info.compacted is not None:
        text = f"{_compact_table(info.compacted)}\n\n{text}"
    print_result({"bundle": str(bundle.path), "manifest": asdict(info)}, text, as_json)


def _compact_table(fact: CompactFact) -> str:
    """What went, layer by layer, and what kept more from going."""
    rows = [("layer", "whole", "compacted", "what kept it from more")]
    for layer in fact.layers:
        before, after = ("x".join(map(str, shape)) for shape in (layer.before, layer.after))
        rows.append((layer.weight, before, after, layer.why))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    ]
    share = fact.n_weights_after / fact.n_weights_before if fact.n_weights_before else 1.0
    lines.append(
        f"{fact.n_removed:,} channels and {fact.n_inputs_dropped:,} unread inputs removed: {fact.n_weights_after:,} "
        f"of {fact.n_weights_before:,} parameters left ({share:.4f})"
    )
    return "\n".join(lines)
