"""Options of how the pictures of a folder become the inputs of a network."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

from sparse_export.cli._click import click
from sparse_export.cli._common import Command

__all__ = ["Normalization", "picture_options"]

Normalization = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and deviation of each channel of pictures in 0 to 1."""


def picture_options(function: Command) -> Command:
    """Add --mean, --std, --interpolation, --resize, --classes and --workers to a command.

    It gets them as the keyword `pictures`, a `PictureSettings`, None without any of them. One with the option
    --fold-preprocess gets `normalization` too: the mean and deviation of each channel where they belong to
    that, and else None.
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
        is_folder = (options.get("data") or "").startswith("imagefolder:")
        if "fold" in options:
            by_channel = None if is_folder or options["fold"] is None else _normalization(mean, std)
            options["normalization"] = by_channel
            if by_channel is not None:
                mean = std = None
        given = {
            "mean": None if mean is None else _numbers("mean", mean, 3),
            "std": None if std is None else _numbers("std", std, 3),
            "interpolation": interpolation,
            "resize": resize,
            "classes": classes,
        }
        named: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if named and not is_folder:
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


def _normalization(mean: str | None, std: str | None) -> Normalization | None:
    """Both, for any number of channels; None where neither was given. Raises click's usage error."""
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        given, missing = ("--std", "--mean") if mean is None else ("--mean", "--std")
        raise click.UsageError(f"{given} was given without {missing}: give both, a number for each channel.")
    return _numbers("mean", mean, None), _numbers("std", std, None)


def _numbers(name: str, text: str, n: int | None) -> tuple[float, ...]:
    """The numbers of `--mean 0.5,0.5,0.5`, n of them, any number for None. Raises click's usage error."""
    try:
        found = tuple(float(word) for word in text.split(","))
    except ValueError:
        found = ()
    good = all(math.isfinite(one) and (name == "mean" or one > 0) for one in found)
    if not found or not good or len(found) != (n or len(found)):
        count = "three numbers" if n == 3 else "numbers by channel"
        raise click.UsageError(
            f"--{name} is {text!r}; {count}{'' if name == 'mean' else ' above 0'} were expected, "
            "like 0.5,0.5,0.5."
        )
    if name == "std" and min(found) < 1e-6:
        raise click.UsageError(f"--{name} is {text!r}; numbers from 0.000001 on were expected.")
    if any(abs(one) > 1 for one in found):
        raise click.UsageError(
            f"--{name} is {text!r}, and pictures are scaled to 0 to 1 before. Divide the numbers by 255."
        )
    return found
