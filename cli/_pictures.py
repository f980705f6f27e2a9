"""Options of how the pictures of a folder become the inputs of a network."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

from sparse_export.cli._click import click
from sparse_export.cli._common import Command

__all__ = ["picture_options"]


def picture_options(function: Command) -> Command:
    """Add --mean, --std, --interpolation, --resize, --classes and --workers to a command.

    It gets them as the keyword `pictures`, a `PictureSettings`, None without any of them.
    """

    @functools.wraps(function)
    def wrapped(
        *args: Any,
        mean: str | None,
        std: str | None,
        interpolation: str | None,
        resize: int | None,
        classes: Path | None,
        workers: int,
        **options: Any,
    ) -> None:
        given = {
            "mean": None if mean is None else _three_numbers("mean", mean),
            "std": None if std is None else _three_numbers("std", std),
            "interpolation": interpolation,
            "resize": resize,
            "classes": classes,
        }
        named: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if named and not (options.get("data") or "").startswith("imagefolder:"):
            raise click.UsageError(
                f"--{next(iter(named))} belongs to --data imagefolder:DIR; data on record have their own."
            )
        pictures = None
        if named or workers:
            from sparse_export.tasks.data.picture_settings import PictureSettings, class_numbers

            if classes is not None:
                named["classes"] = class_numbers(classes)
            pictures = PictureSettings(**named, workers=workers)
        function(*args, pictures=pictures, **options)

    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped


_OPTIONS = (
    click.option("--mean", metavar="R,G,B", help="Subtracted of pictures in 0 to 1. Default: ImageNet's."),
    click.option("--std", metavar="R,G,B", help="What pictures are divided by. Default: ImageNet's."),
    click.option(
        "--interpolation",
        type=click.Choice(["bilinear", "bicubic"]),
        help="How pictures are scaled. Default: bilinear.",
    ),
    click.option(
        "--resize",
        type=click.IntRange(1),
        metavar="PIXELS",
        help="Shorter side of pictures before their middle is cut out. Default: that of the cut.",
    ),
    click.option(
        "--classes",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Class number of each folder of pictures, as JSON or text. Default: by their sorted names.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(0, 256),
        default=0,
        show_default=True,
        help="Processes that decode pictures; 0 for threads.",
    ),
)


def _three_numbers(name: str, text: str) -> tuple[float, ...]:
    """The numbers of `--mean 0.5,0.5,0.5`. Raises click's usage error."""
    try:
        found = tuple(float(word) for word in text.split(","))
    except ValueError:
        found = ()
    if len(found) != 3 or not all(math.isfinite(one) and (name == "mean" or one > 0) for one in found):
        raise click.UsageError(
            f"--{name} is {text!r}; three numbers{'' if name == 'mean' else ' above 0'} were expected, "
            "like 0.5,0.5,0.5."
        )
    if name == "std" and min(found) < 1e-6:
        raise click.UsageError(f"--{name} is {text!r}; numbers from 0.000001 on were expected.")
    if any(abs(one) > 1 for one in found):
        raise click.UsageError(
            f"--{name} is {text!r}, and pictures are scaled to 0 to 1 before. Divide the numbers by 255."
        )
    return found
