"""sparse-export sparsify"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_export.cli._click import click
from sparse_export.cli._common import (
    axes_option,
    code_trust_option,
    data_dir_option,
    device_option,
    json_option,
    max_drop_help,
    print_result,
    say,
    shape_of_sample,
    sizes_option,
)
from sparse_export.cli._pictures import picture_options

if TYPE_CHECKING:
    from sparse_export.tasks.data.picture_settings import PictureSettings


@click.command("sparsify")
@click.argument("model")
@click.option("--pattern", default="2:4", show_default=True, help="At most N nonzeros in every M weights.")
@click.option(
    "--weights", metavar="WHICH", help="pretrained, random, or a file; for a network that is named."
)
@click.option(
    "--method",
    type=click.Choice(["magnitude", "activation", "reconstruction"]),
    default="magnitude",
    show_default=True,
    help="How the weights that stay are chosen; all but magnitude need data.",
)
@click.option("--permute", is_flag=True, help="Look for an order of channels first that loses less.")
@click.option(
    "--data",
    help="Data set, or none; of an ONNX file what it is scored on, npz:FILE or package.module:data. "
    "Default: that of the run.",
)
@click.option(
    "--task", metavar="NAME", help="What it is for, as validate takes it. Default: that of the run."
)
@data_dir_option
@picture_options
@click.option(
    "--calibration-samples",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Samples of the training part that the layers are looked at with.",
)
@click.option("--finetune", type=click.IntRange(0), default=0, help="Epochs of training afterwards.")
@click.option(
    "--distill",
    type=click.Choice(["outputs", "features"]),
    help="With --finetune: learn the dense network's outputs, or those of its layers too, without labels.",
)
@click.option("--moving", is_flag=True, help="Let the masks move while fine-tuning, under the pattern.")
@click.option(
    "--keep-dense", multiple=True, metavar="PATTERN", help="A layer that stays as it is; * stands for any."
)
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Prune the layers that a plan chose, and only those.",
)
@click.option(
    "--max-drop",
    metavar="AMOUNT",
    help="Make as many layers sparse as the score allows, and say which. " + max_drop_help,
)
@click.option(
    "--timings",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With --max-drop: choose by the time that layers save, as plan measured it, not by multiply-adds.",
)
@click.option(
    "--dry-run", is_flag=True, help="Show what each layer changes if it alone is sparse, and write nothing."
)
@click.option(
    "--recover",
    metavar="STEPS",
    default="none",
    show_default=True,
    help="Bring layers back towards the dense network, without labels: some of auto, damping, streams, "
    "sums, bias, variance, joint.",
)
@click.option(
    "--norms", is_flag=True, help="Re-estimate batch norms on the calibration samples; kept where it helps."
)
@click.option(
    "--errors", is_flag=True, help="Measure each layer's error by magnitude too: a walk over the samples."
)
@click.option("--input-shape", metavar="C,H,W", help="Of one sample, where nothing else tells it.")
@click.option(
    "--inputs",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Real inputs without labels, an .npz with an array for each input, in place of --data.",
)
@axes_option
@sizes_option
@click.option(
    "--calibration-memory",
    type=click.IntRange(1),
    default=1536,
    show_default=True,
    metavar="MIB",
    help="Of values that are kept in memory on the walk over an ONNX graph; others go to disk.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Run folder to write. Default: runs/MODEL-sparsified."
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of everything that is drawn."
)
@device_option
@code_trust_option
@json_option
def command(
    model: str,
    pattern: str,
    weights: str | None,
    method: str,
    permute: bool,
    data: str | None,
    task: str | None,
    data_dir: Path | None,
    pictures: PictureSettings | None,
    calibration_samples: int,
    finetune: int,
    distill: str | None,
    moving: bool,
    keep_dense: tuple[str, ...],
    plan_file: Path | None,
    max_drop: str | None,
    timings: Path | None,
    dry_run: bool,
    recover: str,
    norms: bool,
    errors: bool,
    input_shape: str | None,
    inputs: Path | None,
    axes: tuple[str, ...],
    sizes: tuple[str, ...],
    calibration_memory: int,
    out: Path | None,
    seed: int,
    device: str,
    trust: str | None,
    as_json: bool,
) -> None:
    """Make a trained network N:M sparse: an ONNX file, a run, a name, or package.module:factory.

    Writes a run that build takes, and shows what each layer kept and how good the network is after each step.
    The dense network is left as a run too, in that folder's name with -dense behind it, unless it came from
    one. A killed command goes on at the last layer that it had finished. Exit 3 where --max-drop allows no
    sparse layer.
    """
    shape = None if input_shape is None else shape_of_sample(input_shape)

    from dataclasses import asdict

    from sparse_export.cli._progress import layer_observer, training_observer
    from sparse_export.oneshot import layer_sensitivities, sparsify

    common: dict[str, Any] = {
        "pattern": pattern,
        "weights": weights,
        "method": method,
        "data": data,
        "task": task,
        "data_dir": data_dir,
        "pictures": pictures,
        "calibration_samples": calibration_samples,
        "keep_dense": keep_dense,
        "input_shape": shape,
        "inputs": inputs,
        "axes": axes,
        "sizes": sizes,
        "calibration_memory": calibration_memory << 20,
        "seed": seed,
        "device": device,
        "trust": trust,
        "timings": timings,
        "recover": recover,
    }
    if dry_run:
        for option, given in (("--permute", permute), ("--plan", plan_file is not None), ("--norms", norms)):
            if given:
                raise click.UsageError(f"--dry-run and {option} exclude each other.")
        with layer_observer() as finished:
            changes = layer_sensitivities(model, finished=finished, **common)
        print_result(asdict(changes), changes.shown(), as_json)
        return
    planned_dense = None
    if plan_file is not None:
        from sparse_export.oneshot.source import name_of
        from sparse_export.plan.planning import dense_by_plan

        planned_dense = dense_by_plan(plan_file, name_of(model), instead="There is nothing to sparsify.")
    out = out or Path("runs") / f"{_plain(model)}-sparsified"
    with training_observer() as observer, layer_observer() as finished:
        done = sparsify(
            model,
            out,
            permute=permute,
            finetune=finetune,
            distill=distill,
            moving=moving,
            planned_dense=planned_dense,
            norms=norms,
            errors=errors,
            max_drop=max_drop,
            scored=say,
            observer=observer,
            finished=finished,
            **common,
        )
    document = {"run": str(done.run.path), **asdict(done.report)}
    print_result(document, done.report.shown(), as_json, path=done.run.path)


def _plain(model: str) -> str:
    """A network's name, or the last part of a path, as part of a file name."""
    return (Path(model).name.removesuffix(".onnx") or "model").replace(":", "-")
