"""Work on graphs without Python's search for circles of objects that nobody uses."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["without_collection"]


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Put off the search for unused circles of objects until the end; usable as a decorator.

    A graph is many small objects, nearly all of which stay: the search takes a third of the time to open one.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
