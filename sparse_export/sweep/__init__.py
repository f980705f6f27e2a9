"""Many training runs from one table: methods x densities x seeds x settings, and what came of them."""

from __future__ import annotations

__all__: list[str] = []
