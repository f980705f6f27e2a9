"""sparse-export build"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_export.cli._click import click
from sparse_export.cli._common import code_trust_option, json_option, print_result

if TYPE_CHECKING:
    from sparse_export.engines.options import Precision
    from sparse_export.formats.bundle import Bundle, BundleInfo, CompactInfo, PatternInfo
    from sparse_export.graph.passes.fit_pattern import Gather


@click.command("build")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Bundle folder to write. Default: RUN-bundle.")
@click.option(
    "--target", "targets", multiple=True, default=("onnx",), show_default=True, help="What to build for."
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "int8", "fp8"]),
    default="fp32",
    show_default=True,
    help="Of the graph and its engines; inputs and outputs stay fp32.",
)
@click.option(
    "--calibrate",
    type=click.IntRange(min=8),
    default=256,
    show_default=True,
    metavar="N",
    help="Training samples that int8 and fp8 take their ranges from.",
)
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    metavar="MIN:OPT:MAX",
    help="Batch sizes that an engine is made for; several may be given.  [default: 1:8:32]",
)
@click.option(
    "--gpu-arch", metavar="SM,...", help="GPUs that a tensorrt-rtx engine is made for, as in sm80,sm89."
)
@click.option("--workspace", type=click.IntRange(min=1), metavar="MIB", help="Scratch memory of an engine.")
@click.option("--opt-level", type=click.IntRange(0, 5), help="How long TensorRT searches.")
@click.option(
    "--hardware-compatible",
    "hardware",
    type=click.Choice(["none", "ampere-plus", "same-compute-capability"]),
    default="none",
    show_default=True,
    help="Other GPUs that a tensorrt engine runs on, at a cost in speed.",
)
@click.option(
    "--version-compatible", is_flag=True, help="Let later TensorRT releases load a tensorrt engine."
)
@click.option(
    "--time-layers",
    is_flag=True,
    help="Time each layer of an engine against one without sparse kernels; needs the GPU.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be built; write nothing.")
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
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="As --pattern 2:4, for the layers that a plan chose; the others stay dense.",
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
    help="Where the data sets lie, to measure accuracy around --pattern and to calibrate.",
)
@code_trust_option
@json_option
def command(
    run: Path,
    out: Path | None,
    targets: tuple[str, ...],
    precision: Precision,
    calibrate: int,
    profiles: tuple[str, ...],
    gpu_arch: str | None,
    workspace: int | None,
    opt_level: int | None,
    hardware: str,
    version_compatible: bool,
    time_layers: bool,
    dry_run: bool,
    compact: bool,
    form: str,
    pattern: str | None,
    plan_file: Path | None,
    max_cut: float,
    gather: Gather,
    data_dir: Path | None,
    trust: str | None,
    as_json: bool,
) -> None:
    """Export RUN to a bundle: ONNX, a golden input and output, a manifest with hashes.

    The file is run once and held against the network before it takes its name. Engines of the targets
    tensorrt and tensorrt-rtx are built from it; one that cannot be built ends with 1 or 5 after the bundle
    with the rest is there.
    """
    from dataclasses import asdict

    from sparse_export.building import BuildRequest, build_from_request
    from sparse_export.building import dry_run as planned
    from sparse_export.cli._progress import engine_observer
    from sparse_export.engines.options import engine_options

    engines = engine_options(
        targets,
        profiles=profiles,
        architectures=gpu_arch or "",
        workspace_mib=workspace,
        optimization_level=opt_level,
        hardware=hardware,
        version_compatible=version_compatible,
    )
    asked = BuildRequest(
        targets=targets,
        compact=compact,
        onnx=form,
        pattern=pattern if plan_file is None else pattern or "2:4",
        max_cut=max_cut,
        gather=gather,
        planned_dense=None if plan_file is None else _planned_dense(run, plan_file),
        precision=precision,
        n_calibration=calibrate,
        engines=engines,
        time_layers=time_layers,
    )
    if dry_run:
        plan = planned(run, out, asked)
        print_result(asdict(plan), str(plan), as_json)
        return
    with engine_observer() as progress:
        bundle = build_from_request(run, out, asked, data_dir=data_dir, progress=progress, trust=trust)
    document = {"bundle": str(bundle.path), "manifest": asdict(bundle.info)}
    print_result(document, _bundle_text(bundle, form), as_json)


def _planned_dense(run: Path, plan_file: Path) -> dict[str, str]:
    """The weights of the run that a plan leaves dense."""
    from sparse_export.formats.run import read_run_info
    from sparse_export.plan.planning import dense_by_plan

    return dense_by_plan(plan_file, read_run_info(run).model.name, instead="Build without a plan.")


def _bundle_text(bundle: Bundle, form: str) -> str:
    """What was written, below what became of channels and layers."""
    from sparse_export.formats.bundle import MODEL_FILE

    info = bundle.info
    sizes = [
        f"{name} {fact.size_bytes:,} bytes{' packed' if form != 'dense' and name == MODEL_FILE else ''}"
        for name, fact in info.files.items()
        if name.endswith(".onnx")
    ]
    text = (
        f"{info.model.name}, {info.n_nonzero:,} of {info.n_parameters:,} parameters not zero, "
        f"{info.precision}, ONNX opset {info.opset}\n{'; '.join(sizes)}\n{_engines_text(info)}{bundle.path}"
    )
    if info.compacted is not None:
        text = f"{_compact_table(info.compacted)}\n\n{text}"
    if info.fitted is not None:
        text = f"{_pattern_table(info.fitted)}\n\n{text}"
    return text


def _engines_text(info: BundleInfo) -> str:
    """A line an engine: what it is, and how long it took."""
    return "".join(
        f"{one.file} {info.files[one.file].size_bytes:,} bytes, {one.target} {one.version}, built in "
        f"{one.build_s:.1f} s"
        f"{f' on {one.gpu}' if one.gpu else ''}\n"
        for one in info.engines
    )


def _compact_table(fact: CompactInfo) -> str:
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
        f"{fact.n_removed:,} channels and {fact.n_inputs_dropped:,} unread inputs removed: "
        f"{fact.n_weights_after:,} "
        f"of {fact.n_weights_before:,} parameters left ({share:.4f})"
    )
    return "\n".join(lines)


def _pattern_table(fact: PatternInfo) -> str:
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
        f"{len(obeying)} of {len(fact.layers)} layers are {fact.pattern}, {n_obeying:,} of {n_weights:,} "
        "weights; "
        f"{sum(layer.n_cut for layer in fact.layers):,} cut"
    )
    if any(layer.road == "gathered" for layer in fact.layers):
        names = ", ".join(layer.name for layer in fact.layers if layer.road == "gathered")
        lines.append(f"a Gather puts the input in another order for {names}")
    if fact.accuracy_before is None or fact.accuracy_after is None:
        lines.append(f"accuracy not measured, because {fact.not_measured}")
    else:
        from sparse_export.tasks.accuracy import accuracy_text

        before, after = (accuracy_text(found) for found in (fact.accuracy_before, fact.accuracy_after))
        lines.append(f"test accuracy {before} before, {after} after; {fact.n_changed:,} answers are others")
    return "\n".join(lines)
