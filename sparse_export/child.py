"""Work in a process of its own."""

from __future__ import annotations

from pathlib import Path


def import_root() -> Path:
    """The folder from which `sparse_export` was imported: a checkout may run without being installed."""
    return Path(__file__).resolve().parents[1]
