"""What commands share: the one place where results go to stdout, and options that several of them have."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from sparse_export.cli._click import click
from sparse_export.files import json_bytes
from sparse_export.tables import Shown, visible, wrapped_for

__all__ = [
    "Command",
    "Output",
    "axes_option",
    "batches_option",
    "bundle_there",
    "code_trust_option",
    "comparison_options",
    "cuda_graphs_option",
    "data_dir_option",
    "device_option",
    "download_option",
    "inputs_option",
    "json_option",
    "max_drop_help",
    "print_result",
    "require_bundles",
    "results_option",
    "run_option",
    "say",
    "score_options",
    "shape_of_sample",
    "showing",
    "sizes_option",
    "speedup_option",
    "threads_option",
    "timing_options",
    "trust_option",
    "whole_numbers",
]

Command = Callable[..., None]


@dataclass(kw_only=True)
class Output:
    """Where the results of one call of the program go, and whether there has been one."""

    stream: TextIO = field(default_factory=lambda: sys.stdout)
    as_json: bool = False
    printed: bool = False

    def write(self, text: str) -> None:
        """Put it on the stream; what its encoding has not, an odd byte of a file name, is written as an
        escape.
        """
        encoding = self.stream.encoding or "utf-8"
        click.echo(text.encode(encoding, "backslashreplace").decode(encoding), file=self.stream)
        self.printed = True

    def discard(self) -> None:
        """Let what is still buffered go nowhere: else the interpreter fails over it at its end."""
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def json_option(function: Command) -> Command:
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


def print_result(document: Any, shown: Shown | str, as_json: bool, *, path: Path | None = None) -> None:
    """Put a command's result on stdout.

    Args:
        document: JSON-able, the one document with `--json`.
        shown: what people see instead, drawn for the terminal that there is; a string goes out as it is.
        as_json: whether `--json` was given.
        path: what was written, on a line of its own below.
    """
    output = _output()
    if as_json:
        output.write(json_bytes(document).decode().rstrip())
        return
    text = (
        wrapped_for(output.stream, visible(shown))
        if isinstance(shown, str)
        else shown.draw_for(output.stream)
    )
    output.write(text if path is None else f"{text}\n{visible(str(path))}")


@contextlib.contextmanager
def showing(document: Any, shown: Shown | str, as_json: bool) -> Iterator[None]:
    """Put a result on stdout at the end of a block that stores it: also where it cannot be stored.

    Args:
        document: as of `print_result`, as are the others.
    """
    try:
        yield
    finally:
        print_result(document, shown, as_json)


def say(text: str) -> None:
    """Tell people about the progress, on stderr."""
    click.echo(wrapped_for(sys.stderr, visible(text)), err=True)


def require_bundles(*paths: Path) -> None:
    """Check that bundles are there before anything that takes seconds to import is imported.

    Raises:
        UsageError: one does not exist.
    """
    from sparse_export.formats.document import require_there

    for path in paths:
        require_there(path, "bundle", "sparse-export build")


def bundle_there(_: click.Context, __: click.Parameter, path: Path | None) -> Path | None:
    """The same for a parameter of a command. Raises UsageError where it does not exist."""
    if path is not None:
        require_bundles(path)
    return path


def whole_numbers(_: click.Context, __: click.Parameter, text: str) -> tuple[int, ...]:
    """An option's callback: `1,32` as (1, 32)."""
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError as cause:
        raise click.BadParameter(f"{text!r} is not a list of whole numbers like 1,32.") from cause


def shape_of_sample(text: str) -> tuple[int, ...]:
    """The sizes of `--input-shape 3,224,224`."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise click.UsageError(
            f"--input-shape is {text!r}; sizes of one sample were expected, like 3,224,224."
        )
    return tuple(int(word) for word in words)


def _output() -> Output:
    return click.get_current_context().find_root().ensure_object(Output)


def batches_option(default: str) -> Callable[[Command], Command]:
    """--batch of the commands that time calls of several sizes."""
    return click.option(
        "--batch",
        "batches",
        callback=whole_numbers,
        metavar="SIZES",
        default=default,
        show_default=True,
        help="Samples in a timed call.",
    )


def score_options(function: Command) -> Command:
    """--task and --data of the commands that score a network."""
    task = click.option(
        "--task",
        metavar="NAME",
        help="What it is for, as in regression, or package.module:task. Default: as recorded.",
    )
    data = click.option(
        "--data",
        metavar="DATA",
        help="Samples with targets: npz:FILE, package.module:data or imagefolder:DIR. Default: as recorded.",
    )
    return task(data(function))


max_drop_help = "How much may be lost: points of a score in percent, the unit of another, or a share like 2%."


def results_option(files: str) -> Callable[[Command], Command]:
    """--out of the commands that write what they found into a folder."""
    path = click.Path(path_type=Path)
    return click.option("--out", type=path, metavar="FOLDER", help=f"Write {files} there.")


data_dir_option = click.option("--data-dir", type=click.Path(path_type=Path), help="Where the data sets lie.")
download_option = click.option("--download", is_flag=True, help="Fetch the data set when it is not there.")
device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)
run_option = click.option(
    "--run", type=click.Path(path_type=Path), help="The run it was built from, when it was moved since."
)
axes_option = click.option(
    "--axes",
    multiple=True,
    metavar="NAME=A,B,…",
    help="Names for the axes of an input of an ONNX file, _ for one that stays, as in state=_,batch,_.",
)
sizes_option = click.option(
    "--size",
    "sizes",
    multiple=True,
    metavar="NAME=N",
    help="An example of a free size of an ONNX file, as in height=640; may be repeated.",
)
inputs_option = click.option(
    "--inputs",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Real inputs without labels, an .npz with an array for each input.",
)
trust_option = click.option(
    "--trust",
    multiple=True,
    metavar="SHA256",
    help="Allow the code of a run, or the files of a bundle, from elsewhere, by its hash; may be repeated.",
)
code_trust_option = click.option(
    "--trust", metavar="SHA256", help="Allow the code that a run from elsewhere names, by its hash."
)
cuda_graphs_option = click.option(
    "--cuda-graphs", is_flag=True, help="Let engines replay their launches as CUDA graphs."
)
speedup_option = click.option(
    "--require-speedup", type=float, metavar="RATIO", help="Least speed-up, at the low end of its interval."
)
threads_option = click.option(
    "--threads", type=click.IntRange(min=1), help="Threads inside an operator. Default: one a core."
)
_rounds_option = click.option(
    "--rounds", type=int, default=24, show_default=True, help="Interleaved rounds of blocks of calls."
)
_seed_option = click.option(
    "--seed", type=int, default=0, show_default=True, help="Of the timed inputs and the order of the blocks."
)


_most_rounds_option = click.option(
    "--rounds", type=int, default=40, show_default=True, help="The most interleaved rounds at a batch size."
)
_budget_option = click.option(
    "--budget",
    type=float,
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="Time for a batch size, after which dense and sparse count as not told apart.",
)


def comparison_options(function: Command) -> Command:
    """--rounds, --budget, --threads and --seed of the commands that end as soon as times are told apart."""
    return _most_rounds_option(_budget_option(threads_option(_seed_option(function))))


def timing_options(function: Command) -> Command:
    """--rounds, --threads and --seed of the commands that time whole calls."""
    return _rounds_option(threads_option(_seed_option(function)))
