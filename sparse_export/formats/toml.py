"""Reads the tables of TOML files, however deep somebody nested them."""

from __future__ import annotations

import tomllib
from typing import Any

__all__ = ["table_from_toml"]

_DEEPEST = 32  # of what this program reads, nothing is deeper than four


def table_from_toml(content: bytes) -> dict[str, Any]:
    """Read the table of a TOML file.

    Args:
        content: of the file.

    Raises:
        ValueError: it is no TOML in UTF-8, or tables lie more than 32 deep.
    """
    try:
        table = tomllib.loads(content.decode())
    except RecursionError as cause:
        raise ValueError("values within values are nested too deep") from cause
    level: list[Any] = [table]
    for _ in range(_DEEPEST):
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return table
    raise ValueError(f"values within values are nested more than {_DEEPEST} deep")
