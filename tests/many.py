"""Fewer examples of a costly property in `make test`, all of them in `make test-full`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings

# Set by tests/conftest.py before any test module is read: the part of the suite that runs, None for all of
# it.
part: str | None = None


def many(n: int, *, every_day: int, **options: Any) -> Callable[[Any], Any]:
    """Like hypothesis' `settings(max_examples=n, **options)`, and `every_day` examples in the part of that
    name.
    """
    chosen = settings(max_examples=every_day if part == "every-day" else n, **options)
    return lambda test: pytest.mark.many(chosen(test))
