"""Imports a user's own code by its name, `package.module:name`."""

from __future__ import annotations

import importlib
import operator
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sparse_export.errors import UsageError

__all__ = ["attribute_named", "current_folder_first", "kind_of", "module_named"]


@contextmanager
def current_folder_first() -> Iterator[None]:
    """Import from the current folder first, as `python -m` does, while own code is imported and called.

    Not longer: somebody else's folder must not be able to replace libraries that are imported later.
    """
    here = os.getcwd()  # noqa: PTH109 - sys.path holds strings
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def attribute_named(name: str, kind: str, do: str) -> Any:
    """Import what `package.module:attribute` names.

    Args:
        name: as it was given.
        kind: what it should be, for the message.
        do: examples, the end of a sentence.

    Raises:
        UsageError: it is no name, or cannot be imported.
    """
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *attribute.split("."))):
        raise UsageError(
            f"{name!r} does not name a {kind}.",
            do=f"Write package.module:{kind}, {do}.",
        )
    module = module_named(module_name, name)
    try:
        return operator.attrgetter(attribute)(module)
    except AttributeError as cause:
        public = ", ".join(sorted(key for key in vars(module) if not key.startswith("_"))) or "nothing"
        raise UsageError(
            f"The module {module_name} has no {attribute!r}.",
            expected=f"{module_name} has: {public}.",
            do="Correct the name after the colon.",
        ) from cause


def module_named(module_name: str, name: str) -> Any:
    """Import a module.

    Args:
        module_name: of the module.
        name: the name that it is part of, for the message.

    Raises:
        UsageError: it cannot be imported.
    """
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as cause:
        raise UsageError(
            f"The module {module_name} of {name} cannot be imported: {type(cause).__name__}: {cause}.",
            do="Install its package, or put the folder that holds it on PYTHONPATH.",
        ) from cause


def kind_of(value: object) -> str:
    """A value's type, in words: `None`, `a value of type dict` or `a value of type package.module.Class`."""
    if value is None:
        return "None"
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"a value of type {name}"
