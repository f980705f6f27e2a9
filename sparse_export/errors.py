"""The exceptions of sparse-export, one small tree.

Each error says what happened, what was expected, and what to do, and carries the exit code that the command
line ends with.

    SparseExportError              1   failed
    ├── OutputError                1   a result could not be written
    ├── TrainingDiverged           1   the loss is no longer a number
    ├── ProcessLost                1   another process of one training ended
    ├── RanksDiverged              1   processes of one training hold different masks
    ├── EngineBuildFailed          1   TensorRT made no engine of a graph, or crashed over it
    ├── ServerFailed               1   an inference server ended, or does not become ready
    ├── UsageError                 2   invalid arguments
    │   ├── RecipeError            2
    │   ├── FolderInUse            2   another process is writing there
    │   └── UnknownNameError       2   no such model, data set, recipe, runtime …
    ├── GateFailed                 3   accuracy, parity or pattern is not what was promised
    ├── SpeedupNotReached          4
    ├── MissingCapability          5   this machine lacks a library, a device …
    │   └── DataNotFound           5   … or a data set
    ├── ArtefactError              6   a file is corrupt, tampered with, or of another kind
    │   └── NotTrustedError        6   a file would run code that nobody has vouched for
    └── Interrupted              130
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


class SparseExportError(Exception):
    """Base of all errors that sparse-export raises on purpose.

    what: what happened, with the name and the received value.  expected: what would have been right.
    do: the way out.
    """

    exit_code = 1

    def __init__(self, what: str, *, expected: str = "", do: str = "") -> None:
        self.what = what
        self.expected = expected
        self.do = do
        super().__init__(" ".join(part for part in (what, expected, do) if part))


def how_to_get(extra: str) -> str:
    """What to type for an optional part, told for a checkout: the package need not be on a registry."""
    return f"pip install '.[{extra}]' in a checkout of sparse-export"


def first_line(cause: BaseException) -> str:
    """The first line of what an error says.

    Args:
        cause: the error.

    Returns:
        The line without its full stop; the type of an error without a text.
    """
    return str(cause).strip().partition("\n")[0].rstrip(".") or type(cause).__name__


def what_and_do(error: SparseExportError) -> str:
    """What happened and the way out, for a line that tells why something was left out."""
    return " ".join(part for part in (error.what, error.do) if part)


class OutputError(SparseExportError):
    """A result could not be written; nothing half-written is left behind."""


def output_error(path: Path, cause: OSError) -> OutputError:
    """An OutputError for a failed write to `path`, with the system's reason."""
    return OutputError(
        f"Cannot write {path}: {cause.strerror or cause}.",
        expected="A folder with room that this user may write to was expected.",
        do="Choose another place with --out, or make room there.",
    )


class TrainingDiverged(SparseExportError):  # noqa: N818 - named by what happened, like KeyboardInterrupt
    """The loss became NaN or infinite."""


class ProcessLost(SparseExportError):  # noqa: N818 - named by what happened
    """Another process that trains the same network ended, or cannot be reached any more."""


class RanksDiverged(SparseExportError):  # noqa: N818 - named by what happened
    """Processes that train one network no longer hold the same masks."""


class EngineBuildFailed(SparseExportError):  # noqa: N818 - named by what happened
    """TensorRT made no engine of a graph, or its process crashed over it."""


class ServerFailed(SparseExportError):  # noqa: N818 - named by what happened
    """An inference server ended before it was to, or does not become ready."""


class UsageError(SparseExportError, ValueError):
    """Invalid arguments. A ValueError too, for callers of the library."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe does not say what a recipe can say."""


class FolderInUse(UsageError):  # noqa: N818 - named by what happened
    """Another process is writing the folder that was asked for."""


class UnknownNameError(UsageError):
    """A name is not in its list; the message gives the nearest known one."""

    def __init__(self, kind: str, name: str, known: Iterable[str], *, do: str = "") -> None:
        import difflib

        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        super().__init__(
            f"There is no {kind} named {name!r}.", expected=f"{hint}Known: {', '.join(known)}.", do=do
        )


class GateFailed(SparseExportError):  # noqa: N818 - a finding, not a fault
    """Accuracy, parity or pattern is not what was promised."""

    exit_code = 3


class SpeedupNotReached(SparseExportError):  # noqa: N818 - a finding, not a fault
    """The speed-up that was required was not measured."""

    exit_code = 4


class MissingCapability(SparseExportError):  # noqa: N818 - a finding, not a fault
    """This machine lacks a library or a device that was asked for."""

    exit_code = 5


class DataNotFound(MissingCapability):
    """The files of a data set are not where they were looked for."""


class ArtefactError(SparseExportError):
    """A file that another stage wrote is missing parts, changed, of another kind, or not for this machine."""

    exit_code = 6


class NotTrustedError(ArtefactError):
    """Using a file would run code that nobody has vouched for."""


class Interrupted(SparseExportError):  # noqa: N818 - named by what happened, like KeyboardInterrupt
    """The user stopped the work; the message says how to go on."""

    exit_code = 130
