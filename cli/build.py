"""sparse-export build"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_export.cli._click import click
from sparse_export.cli._common import json_option, print_result

if TYPE_CHECKING:
    from sparse_export.artefact import Accuracy, CompactFact, PatternFact
    from sparse_export.graph.lossless import Gather


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
    "--pattern", metavar="N:M", help="Permute channels so that layers obey N:M; the others stay as they are."
)
@click.option(
    "--max-cut",
    type=float,
    default=0.0,
    show_default=True,
    metavar="SHARE",
    help="Share of a layer's magnitude that may be cut for --pattern.",
)
@click.option(
    "--gather",
    type=click.Choice(["none", "input", "any"]),
    default="input",
    show_default=True,
    help="Which layers may get their input in an order of their own for --pattern.",
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Where the data sets lie, to measure accuracy before and after --pattern.",
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
    pattern: str | None,
    max_cut: float,
    gather: Gather,
    data_dir: Path | None,
    trust: str | None,
    as_json: bool,
) -> None:
    """Export RUN to a bundle: ONNX, a golden input and output, a manifest with hashes.

    The file is run once and held against the network before it takes its name.
    """
    from dataclasses import asdict

    from sparse_export.building import build

    bundle = build(
        run,
        out,
        targets=targets,
        compact=compact,
        onnx=form,
        pattern=pattern,
        max_cut=max_cut,
        gather=gather,
        data_dir=data_dir,
        trust=trust,
    )
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
    if info.fitted is not None:
        text = f"{_pattern_table(info.fitted)}\n\n{text}"
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


def _pattern_table(fact: PatternFact) -> str:
    """What became of each layer, and of the accuracy."""
    rows = [
        (
            *("layer", "shape", "density", f"over {fact.pattern}", "then", "of groups", "cut", "now"),
            "why not",
        )
    ]
    for layer in fact.layers:
        counts = (layer.groups_over_before, layer.groups_over_after, layer.n_groups)
        over, then, groups = ("-" if n is None else f"{n:,}" for n in counts)
        now = layer.road if layer.road == "dense" else f"{fact.pattern}, {layer.road}"
        cut = f"{100 * layer.cut:.3g} %" if layer.n_cut else "nothing"
        shape = "x".join(map(str, layer.shape))
        rows.append((layer.name, shape, f"{layer.density:.4f}", over, then, groups, cut, now, layer.reason))
    widths = [max(len(row[column]) for row in rows) for column in range(8)]
    lines = [
        "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[8]]).rstrip()
        for row in rows
    ]
    obeying = [layer for layer in fact.layers if layer.road != "dense"]
    n_weights = sum(math.prod(layer.shape) for layer in fact.layers)
    n_obeying = sum(math.prod(layer.shape) for layer in obeying)
    lines.append(
        f"{len(obeying)} of {len(fact.layers)} layers are {fact.pattern}, {n_obeying:,} of {n_weights:,} weights; "
        f"{sum(layer.n_cut for layer in fact.layers):,} cut"
    )
    if any(layer.road == "gathered" for layer in fact.layers):
        names = ", ".join(layer.name for layer in fact.layers if layer.road == "gathered")
        lines.append(f"a Gather puts the input in another order for {names}")
    if fact.accuracy_before is None or fact.accuracy_after is None:
        lines.append(f"accuracy not measured, because {fact.not_measured}")
    else:
        before, after = (_accuracy(found) for found in (fact.accuracy_before, fact.accuracy_after))
        lines.append(f"test accuracy {before} before, {after} after; {fact.n_changed:,} answers are others")
    return "\n".join(lines)


def _accuracy(found: Accuracy) -> str:
    return f"{found.percent:.3f} % ({found.n_correct}/{found.n_samples})"
