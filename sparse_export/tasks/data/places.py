"""Where data sets lie on disk."""

from __future__ import annotations

import os
from pathlib import Path

from sparse_export.errors import ArtefactError, DataNotFound, UsageError

VARIABLE = "SPARSE_EXPORT_DATA"


def default_data_dir() -> Path:
    """The folder of data sets: $SPARSE_EXPORT_DATA if set, else ~/.cache/sparse-export/data. May not exist.

    Raises UsageError when it starts in a home folder that is not known.
    """
    path = Path(os.environ.get(VARIABLE) or "~/.cache/sparse-export/data")
    try:
        return path.expanduser()
    except RuntimeError as cause:
        raise UsageError(
            f"There is no place for data sets at {path}: {cause}",
            expected=f"A home folder, or another path in {VARIABLE}, was expected.",
            do=f"Set {VARIABLE} to the folder that holds them.",
        ) from cause


def data_not_found(name: str, path: Path, layout: str, *, downloadable: bool = False) -> DataNotFound:
    """An error for data that is not at `path`.

    layout: what was expected, as a path below the data folder.  downloadable: is there a download for it?
    """
    fetch = ", or let `train --download` fetch it" if downloadable else ""
    return DataNotFound(
        f"Data set {name} is not there: {path.absolute()} does not exist.",
        expected=f"{layout} was expected below the data folder.",
        do=f"Name the folder that holds it with --data-dir or in {VARIABLE}{fetch}.",
    )


def damaged(path: Path, why: str, *, expected: str = "", do: str = "Get the file again.") -> ArtefactError:
    """An error for a data file that is there but cannot be what it should be. why: ends the sentence."""
    return ArtefactError(f"{path} {why}.", expected=expected, do=do)
