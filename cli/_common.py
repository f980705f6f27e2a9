"""What every command shares: `--json`, and the one place where results go to stdout."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TextIO

from sparse_export.cli._click import click
from sparse_export.files import json_bytes

__all__ = ["Output", "json_option", "print_result", "say", "timing_options", "visible", "whole_numbers"]

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    """The text with control characters as escapes, but for tabs and line ends.

    Names come out of files of other people, and a terminal obeys what they hold.
    """
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


@dataclass(kw_only=True)
class Output:
    """Where the results of one call of the program go, and whether there has been one."""

    stream: TextIO = field(default_factory=lambda: sys.stdout)
    as_json: bool = False
    printed: bool = False

    def write(self, text: str) -> None:
        """Put it on the stream; what its encoding has not, an odd byte of a file name, is written as an escape."""
        encoding = self.stream.encoding or "utf-8"
        click.echo(text.encode(encoding, "backslashreplace").decode(encoding), file=self.stream)
        self.printed = True


def json_option(function: Callable[..., None]) -> Callable[..., None]:
    """Add `--json` to a command, which gets it as the keyword `as_json`.

    While it runs with `--json`, whatever else prints to stdout, a library for example, goes to stderr.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, as_json: bool, **options: Any) -> None:
        _output().as_json = as_json
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            function(*args, as_json=as_json, **options)

    return click.option(
        "--json",
        "as_json",
        is_flag=True,
        envvar="SPARSE_EXPORT_JSON",
        help="One JSON document on stdout, all else on stderr.",
    )(wrapped)


def print_result(document: Any, text: str, as_json: bool) -> None:
    """Put a command's result on stdout: `document`, JSON-able, as the one JSON document, or `text`."""
    _output().write(json_bytes(document).decode().rstrip() if as_json else visible(text))


def say(text: str) -> None:
    """Tell people about the progress, on stderr."""
    click.echo(visible(text), err=True)


def whole_numbers(_: click.Context, __: click.Parameter, text: str) -> tuple[int, ...]:
    """An option's callback: `1,32` as (1, 32)."""
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError as cause:
        raise click.BadParameter(f"{text!r} is not a list of whole numbers like 1,32.") from cause


def _output() -> Output:
    return click.get_current_context().find_root().ensure_object(Output)


def timing_options(function: Callable[..., None]) -> Callable[..., None]:
    """--rounds, --threads and --seed of the commands that time whole calls."""
    for option in (
        click.option(
            "--seed",
            type=int,
            default=0,
            show_default=True,
            help="Of the timed inputs and the order of the blocks.",
        ),
        click.option(
            "--threads", type=click.IntRange(min=1), help="Threads inside an operator. Default: one a core."
        ),
        click.option(
            "--rounds", type=int, default=24, show_default=True, help="Interleaved rounds of blocks of calls."
        ),
    ):
        function = option(function)
    return function
