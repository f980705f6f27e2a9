"""Checks of single arguments; what they raise says the argument's name and the value that was given."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

from sparse_export.errors import UsageError

__all__ = ["require_fraction", "require_one_of", "require_steps"]


def require_fraction(name: str, value: float) -> None:
    """Raise UsageError for a number that is not from 0 to 1."""
    if not 0 <= value <= 1:
        raise UsageError(f"{name} is {value}.", expected="A number from 0 to 1 was expected.")


def require_steps(name: str, value: int | None) -> None:
    """Raise UsageError for what is no whole number of steps from 1 on; None is one that nobody gave."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise UsageError(f"{name} is {value}.", expected="A whole number of steps, 1 or more, was expected.")


def require_one_of(name: str, choice: str | None, choices: Sequence[str]) -> None:
    """Raise UsageError for a word that is none of the choices; None is one that nobody gave."""
    if choice is not None and choice not in choices:
        raise UsageError(f"{name} is {choice!r}.", expected=f"One of {', '.join(choices)} was expected.")
