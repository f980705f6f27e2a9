"""sparse-export build"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_export.cli._click import click
from sparse_export.cli._common import (
    axes_option,
    code_trust_option,
    inputs_option,
    json_option,
    print_result,
    say,
    shape_of_sample,
    sizes_option,
)
from sparse_export.cli._pictures import picture_options

if TYPE_CHECKING:
    from sparse_export.cli._pictures import Normalization
    from sparse_export.engines.options import Precision
    from sparse_export.formats.bundle import Bundle, BundleInfo, CompactInfo, PatternInfo
    from sparse_export.formats.preparation import RawType
    from sparse_export.graph.passes.fit_pattern import Gather
    from sparse_export.tables import Shown, Table
    from sparse_export.tasks.data.picture_settings import PictureSettings


@click.command("build")
@click.argument("run", metavar="MODEL", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Bundle folder to write. Default: RUN-bundle.")
@click.option(
    "--weights", metavar="WHICH", help="pretrained, random, or a file; for a network that is named."
)
@click.option("--data", help="Data set to score a network on that is named.")
@click.option("--input-shape", metavar="C,H,W", help="Of one sample, where nothing else tells it.")
@inputs_option
@axes_option
@sizes_option
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
    metavar="[SIZE=]MIN:OPT:MAX,...",
    help="Bounds of each free size that an engine is made for, the batch where no name stands before them; "
    "several may be given.  [default: batch=1:8:32]",
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
@click.option("--dry-run", is_flag=True, help="Show what would be built; write no bundle.")
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
    "--labels",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Names of the classes, one a line. Default: those that the run has of its data set.",
)
@click.option(
    "--preprocess",
    is_flag=True,
    help="Write preprocess.onnx too, which makes the network's input of raw pictures as training did.",
)
@click.option(
    "--fold-preprocess",
    "fold",
    type=click.Choice(["float32", "uint8"]),
    help="Let the graph take raw samples of this type: their scaling and normalization is folded into it.",
)
@click.option(
    "--postprocess",
    "postprocess",
    multiple=True,
    metavar="WHAT",
    help="Append softmax or sigmoid, argmax, topk:K to the graph; may be repeated. The scores stay the first "
    "output.",
)
@picture_options
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Where the data sets lie, to measure the score around --pattern and to calibrate.",
)
@code_trust_option
@json_option
def command(
    run: Path,
    out: Path | None,
    weights: str | None,
    data: str | None,
    input_shape: str | None,
    inputs: Path | None,
    axes: tuple[str, ...],
    sizes: tuple[str, ...],
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
    labels: Path | None,
    preprocess: bool,
    fold: RawType | None,
    postprocess: tuple[str, ...],
    data_dir: Path | None,
    pictures: PictureSettings | None,
    normalization: Normalization | None,
    trust: str | None,
    as_json: bool,
) -> None:
    """Export MODEL to a bundle: ONNX, a golden input and output, a manifest with hashes.

    MODEL is a run, or a dense network: an ONNX file, a name with --weights, or package.module:factory. Of
    these a dense run is written first, runs/NAME-dense. The file is run once and held against the network
    before it takes its name. Engines of the targets tensorrt and tensorrt-rtx are built from it; one that
    cannot be built ends with 1 or 5 after the bundle with the rest is there.
    """
    from dataclasses import asdict

    from sparse_export.building import BuildRequest, build_from_request
    from sparse_export.building import dry_run as planned
    from sparse_export.building.from_source import run_at
    from sparse_export.cli._progress import engine_observer
    from sparse_export.engines.options import engine_options
    from sparse_export.oneshot.graph_source import Told

    run = run_at(
        run,
        weights=weights,
        told=Told(axes=axes, sizes=sizes, inputs=inputs, raw=fold),
        input_shape=None if input_shape is None else shape_of_sample(input_shape),
        data=data,
        data_dir=data_dir,
        trust=trust,
        pictures=pictures,
    )
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
        inputs=inputs,
        labels=labels,
        preprocess=preprocess,
        fold=fold,
        mean=() if normalization is None else normalization[0],
        std=() if normalization is None else normalization[1],
        postprocess=postprocess,
        workers=0 if pictures is None else pictures.workers,
    )
    if dry_run:
        plan = planned(run, out, asked)
        print_result(asdict(plan), str(plan), as_json)
        return
    with engine_observer() as progress:
        bundle = build_from_request(run, out, asked, data_dir=data_dir, progress=progress, trust=trust)
    if labels is not None:
        _warn_of_repeated(labels, bundle)
    document = {"bundle": str(bundle.path), "manifest": asdict(bundle.info)}
    print_result(document, _bundle_shown(bundle, form), as_json, path=bundle.path)


def _warn_of_repeated(labels: Path, bundle: Bundle) -> None:
    """Say which names several classes have."""
    from sparse_export.tasks.class_names import repeated_names

    repeated = repeated_names(bundle.info.task.labels)
    if repeated:
        shown = ", ".join(repeated[:5]) + (" …" if len(repeated) > 5 else "")
        say(f"warning: --labels {labels} gives several classes one name: {shown}")


def _planned_dense(run: Path, plan_file: Path) -> dict[str, str]:
    """The weights of the run that a plan leaves dense."""
    from sparse_export.formats.run import read_run_info
    from sparse_export.plan.planning import dense_by_plan

    return dense_by_plan(plan_file, read_run_info(run).model.name, instead="Build without a plan.")


def _bundle_shown(bundle: Bundle, form: str) -> Shown:
    """What was written, below what was done to channels and layers."""
    from sparse_export.building.gain import gain_of_bundle
    from sparse_export.formats.bundle import MODEL_FILE
    from sparse_export.tables import Shown

    info = bundle.info
    sizes = [
        f"{name} {file.size_bytes:,} bytes{' packed' if form != 'dense' and name == MODEL_FILE else ''}"
        for name, file in info.files.items()
        if name.endswith(".onnx")
    ]
    text = (
        f"{info.model.name}, {info.n_nonzero:,} of {info.n_parameters:,} parameters not zero, "
        f"{info.precision}, ONNX opset {info.opset}\n{'; '.join(sizes)}\n{_folded_text(info)}"
        f"{_engines_text(info)}{gain_of_bundle(info)}"
    ).rstrip("\n")
    parts: list[str | Table] = [] if info.fitted is None else _pattern_parts(info.fitted)
    parts += [] if info.compacted is None else _compact_parts(info.compacted)
    return Shown([*parts, text])


def _folded_text(info: BundleInfo) -> str:
    """A line that says what the graph takes, where that is raw samples."""
    return "" if info.folded is None else f"takes {info.folded.words}\n"


def _engines_text(info: BundleInfo) -> str:
    """A line an engine: what it is, and how long it took; what of them is not served."""
    return "".join(
        f"{one.file} {info.files[one.file].size_bytes:,} bytes, {one.target} {one.version}, built in "
        f"{one.build_s:.1f} s"
        f"{f' on {one.gpu}' if one.gpu else ''}\n"
        for one in info.engines
    ) + (
        "Triton cannot serve an engine of tensorrt-rtx: `serve` and `package` use the ONNX file\n"
        if any(one.target == "tensorrt-rtx" for one in info.engines)
        else ""
    )


def _compact_parts(info: CompactInfo) -> list[str | Table]:
    """What was removed, layer by layer, and what kept more from being removed."""
    from sparse_export.tables import Table, shape_text

    rows = [
        (layer.weight, shape_text(layer.before), shape_text(layer.after), layer.why) for layer in info.layers
    ]
    share = info.n_weights_after / info.n_weights_before if info.n_weights_before else 1.0
    total = (
        f"{info.n_removed:,} channels and {info.n_inputs_dropped:,} unread inputs removed: "
        f"{info.n_weights_after:,} of {info.n_weights_before:,} parameters left ({share:.4f})"
    )
    table = Table(head=("layer", "whole", "compacted", "what kept it from more"), rows=rows)
    return [table, total] if rows else [total]


def _pattern_parts(info: PatternInfo) -> list[str | Table]:
    """What was done to each layer, and the score before and after."""
    from sparse_export.tables import Table, shape_text

    rows = []
    for layer in info.layers:
        counts = (layer.groups_over_before, layer.groups_over_after, layer.n_groups)
        over, then, groups = ("-" if n is None else f"{n:,}" for n in counts)
        now = layer.road if layer.road == "dense" else f"{info.pattern}, {layer.road}"
        cut = f"{100 * layer.cut:.3g} %" if layer.n_cut else "nothing"
        shape = shape_text(layer.shape)
        rows.append((layer.name, shape, f"{layer.density:.4f}", over, then, groups, cut, now, layer.reason))
    head = ("layer", "shape", "density", f"over {info.pattern}", "then", "of groups", "cut", "now", "why not")
    satisfying = [layer for layer in info.layers if layer.road != "dense"]
    n_weights = sum(math.prod(layer.shape) for layer in info.layers)
    n_satisfying = sum(math.prod(layer.shape) for layer in satisfying)
    lines = [
        (
            f"{len(satisfying)} of {len(info.layers)} layers are {info.pattern}, {n_satisfying:,} of "
            f"{n_weights:,} weights; {sum(layer.n_cut for layer in info.layers):,} cut"
        )
    ]
    if any(layer.road == "gathered" for layer in info.layers):
        names = ", ".join(layer.name for layer in info.layers if layer.road == "gathered")
        lines.append(f"a Gather puts the input in another order for {names}")
    if info.score_before is None or info.score_after is None:
        lines.append(f"score not measured, because {info.not_measured}")
    else:
        from sparse_export.tasks.scores import score_text

        before, after = (score_text(found) for found in (info.score_before, info.score_after))
        changed = "" if info.n_changed is None else f"; {info.n_changed:,} predictions changed"
        lines.append(f"test {info.score_before.name} {before} before, {after} after{changed}")
    table = Table(head=head, rows=rows, right=(2, 3, 4, 5, 6))
    return [table, "\n".join(lines)] if rows else ["\n".join(lines)]
