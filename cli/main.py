"""The program `sparse-export`: its commands, and how each error ends it."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

from sparse_export.cli._click import Group, click, grouped
from sparse_export.cli._common import Output
from sparse_export.errors import MissingCapability, SparseExportError, UnknownNameError
from sparse_export.files import json_bytes
from sparse_export.tables import visible, wrapped_for
from sparse_export.telemetry import turn_telemetry_off

__all__ = ["COMMANDS", "cli", "main"]

# name -> one line of help, as the command's own module has it. That module, sparse_export.cli.NAME with _ for
# -, is imported only when the command is called: tests/cli/test_main.py holds the two together.
COMMANDS = {
    "demo": "Train dense, sparse and 2:4, build, validate and compare, on data that is embedded.",
    "train": "Train a network sparse (or dense) by RECIPE, a shipped name or a TOML file.",
    "sparsify": (
        "Make a trained network N:M sparse: an ONNX file, a run, a name, or package.module:factory."
    ),
    "sweep": (
        "Train methods x densities x seeds x settings by GRID, a TOML "
        "file: a table with intervals, and charts."
    ),
    "plan": "Choose the layers of MODEL, a name or a run, that are worth making 2:4 on this card.",
    "build": "Export MODEL to a bundle: ONNX, a golden input and output, a manifest with hashes.",
    "validate": "Check that BUNDLE, or an ONNX file, computes what was trained, and as well.",
    "bench": (
        "Time BUNDLE, or an ONNX file: latency percentiles and throughput, on each runtime, at several "
        "batches."
    ),
    "bench-train": "Time a training step of RECIPE, dense against sparse, in all its parts.",
    "compare": "Compare a dense with a sparse bundle: score, size and time, with intervals.",
    "gate": "Hold BUNDLE to all that deploying it rests on: files, weights, graph, engines, score, speed.",
    "inspect": "Show what a run, a bundle, an .onnx file or an engine holds, layer by layer.",
    "package": "Write BUNDLEs as a model repository of Triton, with the files to deploy it.",
    "serve": "Serve BUNDLEs on this machine with Triton, each held to its golden answer first.",
    "doctor": "Show what this machine has: devices, runtimes, libraries, and what to install.",
}

GROUPS = {
    "Start here": ("demo", "train", "sparsify", "build"),
    "Check and measure": ("validate", "compare", "gate", "inspect", "bench", "bench-train", "plan"),
    "Deploy": ("serve", "package"),
    "More": ("sweep", "doctor"),
}
_INTERRUPTED = 130
_LEAST_SPACE = 2 * 2**30  # bytes of address space; with less, libraries wait for memory for ever
_NO_SPACE = ("failed to map segment", "Cannot allocate memory")  # in the loader's words
_SAME_ORDER_S = 1.0
_YES = {"1", "true", "t", "yes", "y", "on"}
# What a disk, a folder or its owner refuses. Other system errors are faults of the program: they keep a
# traceback.
_REFUSALS = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EISDIR,
    errno.EMFILE,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}


def _module(name: str) -> str:
    """The module of a command."""
    return f"sparse_export.cli.{name.replace('-', '_')}"


class LazyGroup(Group):
    """Lists the commands by the table above and imports one when it is called for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # click's own would sort them

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, *rest = args
        if name in self.commands:
            return name, importlib.import_module(_module(name)).command, rest
        if ctx.resilient_parsing:  # shell completion asks, and wants no error
            return None, None, rest
        raise UnknownNameError("command", name, self.commands, do="See `sparse-export --help`.")

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """As click's, but with the exit codes and error texts of this program."""
        words = list(sys.argv[1:] if args is None else args)
        output = Output()
        extra = {"auto_envvar_prefix": "SPARSE_EXPORT", "obj": output} | extra

        def call() -> Any:
            return super(LazyGroup, self).main(
                words, prog_name or "sparse-export", complete_var, standalone_mode=False, **extra
            )

        if not standalone_mode:
            return call()
        with _sigterm_interrupts():
            code = _exit_code(call, output, as_json=_json_is_asked_for(words))
        sys.exit(code)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does: children are ended, temporary files removed.

    Training and `serve` answer it in their own way while they run. A second one that comes at once is the
    same order: `timeout` sends it to the process, then to its group.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return
    ordered = -_SAME_ORDER_S

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal ordered
        before, ordered = ordered, time.monotonic()
        if ordered - before > _SAME_ORDER_S:
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _json_is_asked_for(words: Sequence[str]) -> bool:
    """As click decides it, for errors that come before click has read the options."""
    return "--json" in words or os.environ.get("SPARSE_EXPORT_JSON", "").strip().lower() in _YES


def _exit_code(call: Any, output: Output, *, as_json: bool) -> int:
    """Run a command to its end, tell what went wrong, and return the code to exit with."""
    try:
        try:
            _require_address_space()
            code = call()
            output.stream.flush()
        except OSError as cause:
            if cause.errno == errno.ENOMEM:
                raise _no_memory() from cause
            if cause.errno not in _REFUSALS:
                raise
            if cause.errno == errno.ENOSPC and cause.filename is None:
                output.discard()
            raise _refused(cause) from cause
        except MemoryError as cause:
            raise _no_memory(str(cause)) from cause
        except ImportError as cause:
            if any(words in str(cause) for words in _NO_SPACE):
                raise _no_memory(str(cause)) from cause
            raise
        except SystemExit as cause:
            if isinstance(cause.__context__, OSError) and cause.__context__.errno == errno.EPIPE:
                raise BrokenPipeError from cause  # click's way to answer one
            raise SparseExportError(
                f"The command was left in the middle by code that called sys.exit({cause.code!r}).",
                do="Look for it in the network, or the module, that the command was given.",
            ) from cause
    except click.ClickException as error:
        vars(error)["message"] = visible(error.message)  # names in it may come from anybody
        _show(error)
        return _report(output, as_json, error, error.format_message(), error.exit_code)
    except SparseExportError as error:
        _complain(wrapped_for(sys.stderr, f"Error: {visible(str(error))}"))
        return _report(output, as_json, error, str(error), error.exit_code)
    except (click.Abort, KeyboardInterrupt) as error:
        _complain("Interrupted.")
        return _report(output, as_json, error, "Interrupted.", _INTERRUPTED)
    except BrokenPipeError:
        # The reader went away, which is its right. What is still buffered has nowhere to go.
        output.discard()
        return SparseExportError.exit_code
    except Exception as error:  # noqa: BLE001 - the end of the program, and nothing is hidden
        _complain(visible(traceback.format_exc().rstrip("\n")))
        return _report(output, as_json, error, str(error), SparseExportError.exit_code)
    return code if isinstance(code, int) else 0


def _show(error: click.ClickException) -> None:
    """As click does, and no line broken in the middle of a word."""
    shown = io.StringIO()
    error.show(file=shown)
    _complain(wrapped_for(sys.stderr, shown.getvalue().rstrip("\n")))


def _complain(text: str) -> None:
    """Tell of an error on stderr, where there is one."""
    with contextlib.suppress(OSError):
        click.echo(text, err=True)


def _report(output: Output, as_json: bool, error: BaseException, message: str, exit_code: int) -> int:
    """With --json, make the error the one document, unless the command has already printed its own."""
    if (as_json or output.as_json) and not output.printed:
        document = {"error": {"type": type(error).__name__, "message": message, "exit_code": exit_code}}
        with contextlib.suppress(OSError, ValueError):  # there is no place for it, and stderr has the error
            output.write(json_bytes(document).decode().rstrip())
            output.stream.flush()
    return exit_code


def _require_address_space() -> None:
    """Raise MissingCapability where `ulimit -v` leaves too little for the libraries to load."""
    if sys.platform == "win32":
        return
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY and soft < _LEAST_SPACE:
        raise MissingCapability(
            f"This process may use {soft:,} bytes of address space.",
            expected=f"At least {_LEAST_SPACE:,} bytes were expected; training and exporting take more.",
            do="Raise the limit with `ulimit -v unlimited`, or start the command without it.",
        )


def _no_memory(reason: str = "") -> SparseExportError:
    told = f": {reason.strip().rstrip('.')}" if reason.strip() else ""
    return SparseExportError(
        f"There is not enough memory{told}.",
        do="Take fewer samples at once, end other programs, or raise the limit (`ulimit -v`).",
    )


def _name(filename: Any) -> str:
    return os.fsdecode(filename) if isinstance(filename, str | bytes | os.PathLike) else f"file {filename}"


def _refused(cause: OSError) -> SparseExportError:
    if cause.filename is not None:
        return SparseExportError(
            f"Cannot use {_name(cause.filename)}: {cause.strerror or cause}.",
            expected="A place that this user may read, with room and permission to write where that is "
            "needed, "
            "was expected.",
            do="Look at its permissions and the room on its disk, or choose another place.",
        )
    return SparseExportError(
        f"The system refused: {cause.strerror or cause}.",
        expected="Room on the disk and permission to use it were expected.",
        do="Make room, or choose another place.",
    )


def _print_versions(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        from sparse_export.version import library_versions

        click.echo("\n".join(f"{name} {version}" for name, version in library_versions().items()))
        ctx.exit()


@grouped(GROUPS)
@click.group(
    cls=LazyGroup,
    commands={name: click.Command(name, help=text) for name, text in COMMANDS.items()},
    invoke_without_command=True,
    epilog=(
        "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a gate failed, 4 required speed-up not reached, 5 "
        "this machine "
        "lacks what was asked for, 6 an artefact is corrupt or not trusted, 130 interrupted (Ctrl-C, "
        "SIGTERM)."
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    allow_from_autoenv=False,
    callback=_print_versions,
    help="Show the version of sparse-export and of the libraries that decide a result.",
)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Train neural networks by sparse momentum, export them to checked ONNX bundles, compare dense with
    sparse.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(click.UsageError.exit_code)


def _fill_closed_streams() -> None:
    """Open nothing in place of stdin, stdout and stderr that the caller closed: else the next file that is
    opened would take their place, and be written to by whatever prints.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            nothing = os.open(os.devnull, os.O_RDWR)  # takes the lowest descriptor that is free
            if nothing != descriptor:
                os.dup2(nothing, descriptor)
                os.close(nothing)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "r" if name == "stdin" else "w", closefd=False))


def main() -> NoReturn:
    """Entry point of the console script."""
    _fill_closed_streams()
    turn_telemetry_off()
    cli.main()
    raise AssertionError("standalone click exits by itself")
