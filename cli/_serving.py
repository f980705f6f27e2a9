"""What `package` and `serve` share: the options of a model, and names for bundles."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparse_export.cli._click import click

__all__ = ["model_options", "paired"]

# option, default, help, in the order of --help; each is a field of ModelSettings.
_NUMBERS = (
    ("max-batch", None, "Samples in one execution, and in one request.  [default: 64, or what engines take]"),
    ("batch-delay-us", 0, "How long a request may wait for others to share an execution."),
    ("instances", 2, "Copies of each model that work at the same time."),
    ("threads", 1, "Of onnxruntime, inside one of them."),
    ("queue-size", 512, "Requests that may wait; one more is refused; 0: any number."),
    ("queue-timeout-ms", 5000, "How long one may wait before it is refused; 0: any time."),
)


def model_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options of ModelSettings to a command, which gets them as the keyword `settings`."""

    @functools.wraps(function)
    def wrapped(*args: Any, **options: Any) -> None:
        from sparse_export.serving.settings import ModelSettings

        names = [name.replace("-", "_") for name, _, _ in _NUMBERS]
        numbers = {name: options.pop(name) for name in names}
        flags = {"batching": not options.pop("no_batching"), "warmup": not options.pop("no_warmup")}
        settings = ModelSettings(**flags, **numbers)
        function(*args, settings=settings, **options)

    wrapped = click.option("--no-warmup", is_flag=True, help="Run nothing before a model counts as loaded.")(
        wrapped
    )
    wrapped = click.option("--no-batching", is_flag=True, help="Do not merge waiting requests.")(wrapped)
    for name, default, text in reversed(_NUMBERS):
        wrapped = click.option(f"--{name}", type=int, default=default, show_default=True, help=text)(wrapped)
    return wrapped


def paired(bundles: Sequence[Path], names: Sequence[str]) -> list[str | None]:
    """A name for each bundle, None where the folder's is taken."""
    if not names:
        return [None] * len(bundles)
    if len(names) != len(bundles):
        raise click.UsageError(
            f"--name was given {len(names)} times for {len(bundles)} bundles: once for each, or never."
        )
    return list(names)
