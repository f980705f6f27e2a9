"""The click that the commands use: rich-click where it is installed, else click itself, which it extends."""

from __future__ import annotations

from typing import TYPE_CHECKING

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

__all__ = ["Group", "click"]
