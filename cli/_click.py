"""The click that the commands use: rich-click where it is installed, else click itself, which it extends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import click
    from click import Group
else:
    try:
        import rich_click as click
        from rich_click import RichGroup as Group
    except ImportError:
        import click
        from click import Group

__all__ = ["Group", "click", "grouped"]

Command = TypeVar("Command", bound=Callable[..., object])


def grouped(groups: Mapping[str, Sequence[str]]) -> Callable[[Command], Command]:
    """Show the commands of a group under headings; click itself lists them without.

    Args:
        groups: the names of the commands by heading, in the order in which they are shown.
    """
    rich_config = getattr(click, "rich_config", None)
    if rich_config is None:
        return lambda command: command
    panels = [{"name": name, "commands": list(commands)} for name, commands in groups.items()]
    shown: Callable[[Command], Command] = rich_config(help_config={"command_groups": {"*": panels}})
    return shown
