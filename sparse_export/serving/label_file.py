"""Triton's label file: the names of classes, which the server sends with the best scores on request."""

from __future__ import annotations

from collections.abc import Sequence

from sparse_export.serving.tensors import Interface

__all__ = ["LABELS_FILE", "labelled_outputs", "labels_text"]

LABELS_FILE = "labels.txt"


def labelled_outputs(interface: Interface, names: Sequence[str], scores: Sequence[str]) -> tuple[str, ...]:
    """Name the outputs that hold one score for each class.

    Args:
        interface: of the model.
        names: of its classes; empty where they have none.
        scores: outputs that hold scores of classes.

    Returns:
        Names of outputs; none where the server could not tell samples from classes.
    """
    found = (one for one in interface.outputs if one.name in scores and one.dims == (len(names),))
    return tuple(one.name for one in found if names and interface.batched)


def labels_text(names: Sequence[str]) -> str:
    """Write names of classes as the server reads them: one a line, white space within a name as one blank."""
    return "".join(f"{' '.join(name.split())}\n" for name in names)
