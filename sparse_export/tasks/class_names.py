"""The names of a network's classes: on its task, and in a file with one name a line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sparse_export.errors import UsageError
from sparse_export.formats.run import TaskInfo
from sparse_export.signature import Signature

__all__ = ["n_named_classes", "read_class_names", "repeated_names", "with_class_names"]

_MAX_BYTES = 64 * 2**20


def with_class_names(task: TaskInfo, names: Sequence[str], n_outputs: int | None) -> TaskInfo:
    """Set the names of the classes, where there is one for each output.

    Args:
        task: what the network is for.
        names: of the classes of its data; empty where they have none.
        n_outputs: number of the network's outputs; None where they are no scores of classes.

    Returns:
        The task; without names where the network has other outputs than the data have classes.
    """
    return replace(task, labels=tuple(names) if len(names) == n_outputs else ())


def repeated_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names that stand there more than once, each once: their classes cannot be told apart."""
    counts = Counter(names)
    return tuple(name for name, n in counts.items() if n > 1)


def n_named_classes(signature: Signature) -> int | None:
    """Count the classes that the first output of a network has scores for.

    Args:
        signature: of the network. Scores are (batch, classes), (batch, sequence, classes) or
            (batch, classes, height, width).

    Returns:
        Their number; 2 where a sample has one score; None where the output has no axis of classes.
    """
    scores = signature.outputs[0]
    if len(scores.shape) == 1:
        return 2
    n = None if scores.class_axis is None else scores.shape[scores.class_axis]
    return 2 if n == 1 else n if isinstance(n, int) else None


def read_class_names(file: Path, signature: Signature) -> tuple[str, ...]:
    """Read the names of a network's classes.

    Args:
        file: text in UTF-8, one name a line, in the order of the outputs.
        signature: of the network.

    Raises:
        UsageError: the file cannot be read, a line is empty, or there are not as many names as classes.
    """
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise UsageError(f"--labels {file} has more than {_MAX_BYTES >> 20} MiB.", do="Give a text file.")
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as cause:
        raise UsageError(
            f"--labels {file} cannot be read: {cause}.", do="Give a text file in UTF-8, one name a line."
        ) from cause
    names = tuple(line.strip() for line in lines)
    if "" in names:
        raise UsageError(
            f"Line {names.index('') + 1} of --labels {file} is empty.", do="Write one name a line."
        )
    n_classes = n_named_classes(signature)
    if n_classes is None:
        raise UsageError(
            f"--labels {file} was given, and the output {signature.outputs[0]} has no axis of classes.",
            do="Leave --labels out.",
        )
    if len(names) != n_classes:
        raise UsageError(
            f"--labels {file} holds {len(names)} names, and the network has {n_classes} classes.",
            do="Write one name a line, in the order of the outputs.",
        )
    return names
