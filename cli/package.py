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
    "--name",
    "names",
    multiple=True,
    metavar="NAME",
    help="Name of a bundle's models; once for each bundle, in order.",
)
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    metavar="NAME",
    help="tensorrt, onnxruntime or python; may be repeated. Default: all that the bundles have.",
)
@model_options
@click.option(
    "--base-image",
    metavar="IMAGE",
    help="Image of Triton that the Dockerfile begins from. Default: no Dockerfile is written.",
)
@click.option(
    "--image",
    metavar="REFERENCE",
    help="Image that the Dockerfile builds, or without --base-image one of your own that holds the models. "
    "Default: the name of the bundle, or for several of DIR, and a hash.",
)
@click.option(
    "--max-body-mb",
    type=click.IntRange(1, 2047),
    default=64,
    show_default=True,
    help="Size limit of an HTTP body at the ingress.",
)
@click.option(
    "--trust",
    multiple=True,
    metavar="SHA256",
    help="Vouch for the engines of a bundle from elsewhere, by its manifest's hash; may be repeated.",
)
@json_option
def command(
    bundles: tuple[Path, ...],
    out: Path,
    names: tuple[str, ...],
    runtimes: tuple[str, ...],
    settings: ModelSettings,
    base_image: str | None,
    image: str | None,
    max_body_mb: int,
    trust: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write BUNDLEs as a model repository of Triton, with the files to deploy it.

    The package has a model for each bundle and runtime, of which the first is named as `serve` names it,
    Docker and Kubernetes files, a client and a load script. Files that need an image are left out unless
    --base-image or --image gives one.
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
        base_image=base_image,
        image=image,
        max_body_mb=max_body_mb,
        trust=trust,
    )
    for note in packaged.notes:
        say(note)
    document = {
        "package": str(packaged.path),
        "models": [asdict(model) for model in packaged.models],
        "base_image": packaged.base_image,
        "image": packaged.image,
        "tensorrt": packaged.tensorrt,
        "left_out": packaged.left_out,
        "notes": list(packaged.notes),
    }
    lines = [f"{model.name}  from {model.bundle}" for model in packaged.models]
    lines += [f"left out {name}: {reason}" for name, reason in packaged.left_out.items()]
    lines += [f"for the image {packaged.image}"] if packaged.image is not None else []
    print_result(document, "\n".join([*lines, str(packaged.path)]), as_json)
