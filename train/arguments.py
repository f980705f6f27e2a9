"""Checks of single arguments; what they raise says the argument's name and the value that was given."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real

from sparse_export.errors import UsageError

__all__ = [
    "require_flag",
    "require_fraction",
    "require_names",
    "require_number",
    "require_one_of",
    "require_steps",
    "require_texts",
    "require_whole",
]


def require_number(name: str, value: object) -> None:
    """Raise UsageError for what is no number; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UsageError(f"{name} is {value!r}.", expected="A number was expected.")


def require_whole(name: str, value: object) -> None:
    """Raise UsageError for what is no whole number."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UsageError(f"{name} is {value!r}.", expected="A whole number was expected.")


def require_flag(name: str, value: object) -> None:
    """Raise UsageError for what is neither True nor False."""
    if not isinstance(value, bool):
        raise UsageError(f"{name} is {value!r}.", expected="True or False was expected.")


def require_names(**values: object) -> None:
    """Raise UsageError for what is neither None nor a name that another process can look up."""
    for name, value in values.items():
        if value is not None and not isinstance(value, str):
            raise UsageError(
                f"{name} is an object of type {type(value).__name__}, which no other process can make.",
                do=f"Give the name that it has in a module, like {name}='my_module:{name}'.",
            )


def require_texts(name: str, value: object) -> None:
    """Raise UsageError for what is no sequence of texts; one text alone is none."""
    if isinstance(value, str):
        raise UsageError(f"{name} is {value!r}.", do=f"Give a list: {name}=[{value!r}].")
    if not isinstance(value, Sequence) or not all(isinstance(one, str) for one in value):
        raise UsageError(f"{name} is {value!r}.", expected="A list of names was expected.")


def require_fraction(name: str, value: float) -> None:
    """Raise UsageError for what is no number from 0 to 1."""
    require_number(name, value)
    if not 0 <= value <= 1:
        raise UsageError(f"{name} is {value}.", expected="A number from 0 to 1 was expected.")


def require_steps(name: str, value: int | None) -> None:
    """Raise UsageError for what is no whole number of steps from 1 on; None is one that nobody gave."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise UsageError(
            f"{name} is {value!r}.", expected="A whole number of steps, 1 or more, was expected."
        )


def require_one_of(name: str, choice: str | None, choices: Sequence[str]) -> None:
    """Raise UsageError for a word that is none of the choices; None is one that nobody gave."""
    if choice is not None and not (isinstance(choice, str) and choice in choices):
        raise UsageError(f"{name} is {choice!r}.", expected=f"One of {', '.join(choices)} was expected.")
