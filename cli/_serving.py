"""Options that `package` and `serve` share: settings of models, and names for bundles."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparse_export.cli._click import click

__all__ = ["model_options", "paired"]

# option, default, help, in the order of --help; each is a field of ModelSettings.
_NUMBERS = (
    (
        "max-batch",
        None,
        (
            "Maximum number of samples in one execution, and in one "
            "request.  [default: 64, or what engines take]"
        ),
    ),
    ("batch-delay-us", 0, "How long a request may wait for others to share an execution."),
    ("instances", 2, "Copies of each model that run at the same time."),
    ("threads", 1, "Threads of onnxruntime in one instance."),
    (
        "queue-size",
        None,
        "Maximum number of waiting requests; 0: no limit.  [default: 512; 0 for inputs of free length]",
    ),
    (
        "queue-timeout-ms",
        None,
        "How long a request may wait before it is refused; 0: no limit.  [default: 5000; 0 likewise]",
    ),
)


def model_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options of ModelSettings to a command, which gets them as the keyword argument `settings`."""

    @functools.wraps(function)
    def wrapped(*args: Any, **options: Any) -> None:
        from sparse_export.serving.settings import ModelSettings

        names = [name.replace("-", "_") for name, _, _ in _NUMBERS]
        numbers = {name: options.pop(name) for name in names}
        flags = {"batching": not options.pop("no_batching"), "warmup": not options.pop("no_warmup")}
        settings = ModelSettings(**flags, **numbers)
        function(*args, settings=settings, **options)

    wrapped = click.option(
        "--no-warmup", is_flag=True, help="Do not run a batch before a model counts as loaded."
    )(wrapped)
    wrapped = click.option("--no-batching", is_flag=True, help="Do not merge waiting requests.")(wrapped)
    for name, default, text in reversed(_NUMBERS):
        wrapped = click.option(f"--{name}", type=int, default=default, show_default=True, help=text)(wrapped)
    return wrapped


def paired(bundles: Sequence[Path], names: Sequence[str]) -> list[str | None]:
    """Return a name for each bundle, None for that of its folder.

    Raises:
        click.UsageError: names were given, and not one for each bundle.
    """
    if not names:
        return [None] * len(bundles)
    if len(names) != len(bundles):
        raise click.UsageError(
            f"--name was given {len(names)} times for {len(bundles)} bundles: once for each, or never."
        )
    return list(names)
