"""sparse-export package"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparse_export.cli._click import click
from sparse_export.cli._common import json_option, print_result, say
from sparse_export.cli._serving import model_options

if TYPE_CHECKING:
    from sparse_export.serving.settings import ModelSettings


@click.command("package")
@click.argument("bundles", metavar="BUNDLE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Folder to write.")
@click.option(
    "--name", "names", multiple=True, metavar="NAME", help="Of a model; once for each bundle, in order."
)
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    metavar="NAME",
    help="tensorrt, onnxruntime or python. Default: all there are.",
)
@model_options
@click.option(
    "--image", metavar="REFERENCE", help="Of the Docker image. Default: the first bundle's name and hash."
)
@click.option(
    "--max-body-mb",
    type=click.IntRange(1, 2047),
    default=64,
    show_default=True,
    help="Largest HTTP body that the ingress lets through.",
)
@click.option(
    "--trust",
    multiple=True,
    metavar="SHA256",
    help="Allow the engines of a bundle from elsewhere, by its manifest's hash; may be repeated.",
)
@json_option
def command(
    bundles: tuple[Path, ...],
    out: Path,
    names: tuple[str, ...],
    runtimes: tuple[str, ...],
    settings: ModelSettings,
    image: str | None,
    max_body_mb: int,
    trust: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write BUNDLEs as a model repository of Triton, with the files to deploy it.

    A model for each bundle and runtime, Docker and Kubernetes files, a client and a load script.
    """
    from dataclasses import asdict

    from sparse_export.cli._serving import paired
    from sparse_export.serving.package import package

    packaged = package(
        bundles,
        paired(bundles, names),
        out,
        runtimes=runtimes,
        settings=settings,
        image=image,
        max_body_mb=max_body_mb,
        trust=trust,
    )
    for note in packaged.notes:
        say(note)
    document = {
        "package": str(packaged.path),
        "models": [asdict(model) for model in packaged.models],
        "container": packaged.container.reference,
        "image": packaged.image,
        "notes": list(packaged.notes),
    }
    models = "\n".join(f"{model.name}  from {model.bundle}" for model in packaged.models)
    print_result(document, f"{models}\nfor {packaged.container.reference}\n{packaged.path}", as_json)
