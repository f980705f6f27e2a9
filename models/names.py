"""How networks are named that this project does not define."""

from __future__ import annotations

__all__ = ["TIMM", "is_factory"]

TIMM = "timm:"
"""What the name of a network of the timm library begins with."""


def is_factory(name: str) -> bool:
    """Is this written as a user's own `package.module:factory`? Nothing is imported. `timm:NAME` is none."""
    return ":" in name and not name.startswith(TIMM)
