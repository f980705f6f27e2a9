"""Recipes as files: the shipped ones by name, others by path. Nothing here imports torch."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from sparse_export.errors import UnknownNameError, UsageError

__all__ = ["recipe_content", "recipe_names", "require_recipe"]


def recipe_names() -> tuple[str, ...]:
    """The recipes that come with sparse-export."""
    folder = resources.files("sparse_export") / "train" / "recipes"
    return tuple(sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".toml")))


def require_recipe(name: str | Path) -> None:
    """Check that there is such a recipe, before anything is loaded to train by it.

    Args:
        name: of a shipped recipe, or the path of a file.

    Raises:
        UnknownNameError: there is neither such a recipe nor such a file.
        UsageError: what is a path by its looks leads to no file.
    """
    text = str(name)
    if text in recipe_names() or Path(name).is_file():
        return
    do = f"Give the path of a .toml file, or name a recipe: {', '.join(recipe_names())}."
    if text.endswith(".toml") or "/" in text:
        what = "is a folder" if Path(name).is_dir() else "is not there"
        raise UsageError(f"The recipe file {text} {what}.", do=do)
    raise UnknownNameError(
        "recipe", text, recipe_names(), do="Name one of these, or give the path of a .toml file."
    )


def recipe_content(name: str | Path) -> bytes:
    """The TOML of a recipe; arguments and errors as of `require_recipe`."""
    require_recipe(name)
    text = str(name)
    if text in recipe_names():
        return (resources.files("sparse_export") / "train" / "recipes" / f"{text}.toml").read_bytes()
    return Path(name).read_bytes()
