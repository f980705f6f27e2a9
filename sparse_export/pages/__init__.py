"""Pages for people that need nothing else: one HTML file with its style and its pictures in it."""

from __future__ import annotations

__all__: list[str] = []
