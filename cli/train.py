"""sparse-export train"""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_export.cli._click import click
from sparse_export.cli._common import (
    data_dir_option,
    device_option,
    download_option,
    json_option,
    print_result,
)

if TYPE_CHECKING:
    from sparse_export.train.recipe import Recipe

_STARTING = (
    "recipe",
    "dense",
    "density",
    "pattern",
    "transposable",
    "method",
    "products",
    "plan",
    "preset",
    "epochs",
    "seed",
    "cuda_graph",
)


def _typed(name: str) -> bool:
    """Was this parameter on the command line, rather than in the environment?"""
    source = click.get_current_context().get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


_BY = {"csr": "by CSR products", "2:4": "by 2:4 products", "dense": "by dense products"}


@click.command("train")
@click.argument("recipe", required=False)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Run folder to write. Default: runs/RECIPE-DENSITY-SEED."
)
@click.option("--dense", is_flag=True, help="Train the dense baseline: everything else alike.")
@click.option("--density", type=float, help="Kept / total over the masked weights.")
@click.option("--pattern", metavar="N:M", help="At most N of every M weights; alone: as many as that allows.")
@click.option(
    "--transposable", is_flag=True, help="With --pattern 2:4: along both axes, in layers that are matrices."
)
@click.option(
    "--method",
    type=click.Choice(
        [
            "sparse-momentum",
            "set",
            "rigl",
            "rigl-itop",
            "granet",
            "dsr",
            "static",
            "snip",
            "magnitude",
            "dense",
            "sr-ste",
            "asp",
        ]
    ),
    help="How masks move; all but the first are there to compare with, the last two need --pattern.",
)
@click.option(
    "--products",
    type=click.Choice(["dense", "csr", "2:4"]),
    help="csr: leave inactive weights out of the products of Linear layers on the CPU, where that is "
    "timed to win. "
    "2:4: forward products by the card's sparse kernels.",
)
@click.option(
    "--plan",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Train to 2:4 the layers that a plan chose, and only those.",
)
@click.option(
    "--preset",
    type=click.Choice(["default", "reference", "best", "compact"]),
    help="reference: start as the paper's implementation does. best: a density that falls, and more updates. "
    "compact: like best, and ever fewer channels, which build --compact removes.",
)
@click.option("--epochs", type=int, help="Passes over the training set.")
@click.option("--seed", type=int, help="Of the weights, the masks and the order of the samples.")
@click.option(
    "--cuda-graph",
    is_flag=True,
    help="Launch a step on a CUDA device as one graph; for networks whose steps are short.",
)
@data_dir_option
@download_option
@device_option
@click.option(
    "--workers", type=click.IntRange(0), help="Processes that decode the pictures of imagefolder:DIR."
)
@click.option("--resume", is_flag=True, help="Go on with the unfinished run in --out.")
@click.option(
    "--trust",
    metavar="SHA256",
    help="With --resume: allow the code that a run from elsewhere names, by its hash.",
)
@json_option
def command(
    recipe: str | None,
    out: Path | None,
    dense: bool,
    density: float | None,
    pattern: str | None,
    transposable: bool,
    method: str | None,
    products: str | None,
    plan: Path | None,
    preset: str | None,
    epochs: int | None,
    seed: int | None,
    cuda_graph: bool,
    data_dir: Path | None,
    download: bool,
    device: str,
    workers: int | None,
    resume: bool,
    trust: str | None,
    as_json: bool,
) -> None:
    """Train a network sparse (or dense) by RECIPE, a shipped name or a TOML file.

    Shipped: digits, mnist-lenet300-100, mnist-lenet5, fashion-mnist-lenet300-100, fashion-mnist-lenet5,
    cifar10-alexnet-s, cifar10-vgg-d, cifar10-vgg-like, cifar10-wrn-28-2, cifar10-wrn-16-8,
    imagenet-resnet50-10, imagenet-resnet50-20. Ctrl-C saves; --resume goes on. Under torchrun the processes
    train one network together.
    """
    if resume:
        given = [name for name in _STARTING if _typed(name)]
        if given or out is None:
            raise click.UsageError(
                "--resume takes --out RUN, and goes on by the recipe that the run was started with"
                + (f": leave out {', '.join(given)}." if given else ".")
            )
        recipe = None
    if not resume and recipe is None:
        raise click.UsageError("Missing argument 'RECIPE'. Name a shipped recipe or give a TOML file.")
    if dense and method is not None and not resume:
        raise click.UsageError("--dense and --method exclude each other.")
    if (dense or method == "dense") and not resume:
        word = "--dense" if dense else "--method dense"
        for name, value in (
            ("density", density),
            ("pattern", pattern),
            ("products", products),
            ("plan", plan),
        ):
            if value is not None:
                raise click.UsageError(f"{word} and --{name} exclude each other.")
        if transposable:
            raise click.UsageError(f"{word} and --transposable exclude each other.")
    if plan is not None and pattern is not None and not resume:
        raise click.UsageError("--plan excludes --pattern: it decides which layers are 2:4.")
    if trust is not None and _typed("trust") and not resume:
        raise click.UsageError(
            "--trust belongs to --resume: a run that is started now is of your own making."
        )

    from sparse_export.formats.recipe_files import require_recipe

    if recipe is not None:
        require_recipe(recipe)  # before torch is loaded

    from sparse_export.building.gain import gain_of_run
    from sparse_export.cli._progress import training_observer
    from sparse_export.inspection import told_speed
    from sparse_export.tasks.scores import value_text
    from sparse_export.train.loop import train
    from sparse_export.train.recipe import load_recipe

    loaded = None
    if recipe is not None:
        changes = _changes(dense, density, pattern if plan is None else "2:4", method, products, epochs, seed)
        if transposable:
            changes.setdefault("sparsity", {})["transposable"] = True
        if cuda_graph:
            changes["cuda_graph"] = True
        loaded = load_recipe(recipe, preset=preset or "default", changes=changes)
        if plan is not None:
            loaded = _planned(loaded, plan)
        kind = "dense" if loaded.dense else loaded.sparsity.label
        out = out or Path("runs") / f"{Path(recipe).stem}-{kind}-seed{loaded.seed}"
    assert out is not None  # by the checks above
    with training_observer() as observer:
        run = train(
            loaded,
            out,
            data_dir=data_dir,
            download=download,
            device=device,
            workers=workers,
            resume=resume,
            trust=trust,
            observer=observer,
        )
    if os.environ.get("RANK", "0") != "0":
        return  # under torchrun the first process speaks for all
    info = run.info
    document: dict[str, Any] = {
        "run": str(run.path),
        "method": info.method,
        "test_score": info.test.figure if info.test else None,
        "validation_score": info.validation.figure if info.validation else None,
        "test": asdict(info.test) if info.test else None,
        "validation": asdict(info.validation) if info.validation else None,
        "density": info.density,
        "n_active": info.n_active,
        "n_masked": info.n_masked,
        "patterns": {layer.name: layer.pattern for layer in info.layers if layer.pattern is not None},
        "why_dense": {layer.name: layer.why_dense for layer in info.layers if layer.why_dense is not None},
        "products": [asdict(fact) for fact in info.products],
        "speed": asdict(info.speed) if info.speed else None,
        "seconds": info.seconds,
        "epochs": info.epochs,
        "kept_epoch": info.kept_epoch,
        "steps": info.n_steps,
        "seed": info.seed,
        "threads": info.n_threads,
        "device": info.device,
        "processes": info.n_processes,
    }
    dense_layers = [
        f"{layer.name} stays dense: {layer.why_dense}" for layer in info.layers if layer.why_dense is not None
    ]
    products_used = [f"{fact.name} {_BY[fact.by]}: {fact.reason}" for fact in info.products]
    score = f"test {info.test.name} {value_text(info.test)}, " if info.test else ""
    print_result(
        document,
        "\n".join(
            [
                *dense_layers,
                *products_used,
                *([] if info.kept_epoch is None else [f"kept: epoch {info.kept_epoch} of {info.epochs}"]),
                (
                    f"{score}{info.n_active:,} of {info.n_masked:,} weights ({info.density:.4g}), "
                    f"{info.seconds:.1f} s"
                ),
                *(
                    f"{label}: {text}"
                    for label, text in told_speed(info.speed, is_dense=info.method == "dense").items()
                ),
                *filter(None, [gain_of_run(info, shlex.quote(str(run.path)))]),
                str(run.path),
            ]
        ),
        as_json,
    )


def _planned(recipe: Recipe, file: Path) -> Recipe:
    """The recipe with the layers that a plan leaves dense named so.

    Raises UsageError for another network's plan.
    """
    from sparse_export.plan.planning import dense_by_plan
    from sparse_export.train.recipe import recipe_from_table

    dense = dense_by_plan(file, recipe.model, instead="Train the dense baseline: --dense.")
    table = recipe.model_dump(mode="json")
    table["sparsity"] |= {
        "keep_dense": [*recipe.sparsity.keep_dense, *dense],
        "small_share": 0.0,  # the plan decides about small layers too
    }
    return recipe_from_table(table, source=f"with the plan {file}")


def _changes(
    dense: bool,
    density: float | None,
    pattern: str | None,
    method: str | None,
    products: str | None,
    epochs: int | None,
    seed: int | None,
) -> dict[str, Any]:
    given = {"dense": dense or None, "epochs": epochs, "seed": seed}
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    sparsity: dict[str, Any] = {}
    if pattern is not None:
        sparsity |= {"pattern": pattern, "density": None}
    if density is not None:
        sparsity["density"] = density
    if method is not None:
        sparsity["method"] = method
    if products is not None:
        sparsity["products"] = products
    return changes | ({"dense": False, "sparsity": sparsity} if sparsity else {})
