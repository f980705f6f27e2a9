"""The folder of the data sets, and the errors for data that are missing or damaged."""

from __future__ import annotations

import os
from pathlib import Path

from sparse_export.errors import ArtefactError, DataNotFound, UsageError

VARIABLE = "SPARSE_EXPORT_DATA"


def default_data_dir() -> Path:
    """Locate the folder of data sets: $SPARSE_EXPORT_DATA if set, else ~/.cache/sparse-export/data.

    Returns:
        The folder, which need not exist.

    Raises:
        UsageError: it starts in a home folder that is not known.
    """
    path = Path(os.environ.get(VARIABLE) or "~/.cache/sparse-export/data")
    try:
        return path.expanduser()
    except RuntimeError as cause:
        raise UsageError(
            f"There is no place for data sets at {path}: {cause}",
            do=f"Set {VARIABLE} to the folder that holds them.",
        ) from cause


def data_not_found(name: str, path: Path, layout: str, *, downloadable: bool = False) -> DataNotFound:
    """Make the error for missing data.

    Args:
        name: of the data set.
        path: that does not exist.
        layout: the path below the data folder, for the message.
        downloadable: torchvision can download it.
    """
    fetch = ", or let `train --download` fetch it" if downloadable else ""
    return DataNotFound(
        f"Data set {name} is not there: {path.absolute()} does not exist.",
        do=f"Give the folder that holds {layout} with --data-dir or in {VARIABLE}{fetch}.",
    )


def damaged(path: Path, why: str, *, expected: str = "", do: str = "Get the file again.") -> ArtefactError:
    """Make the error for a data file that is not what it should be.

    Args:
        path: of the file.
        why: ends the sentence after the path.
        expected: what is valid, where `why` does not show it.
        do: the way out.
    """
    return ArtefactError(f"{path} {why}.", expected=expected, do=do)
