"""Text of other people in a page: neither tags nor marks that turn or hide text are obeyed."""

from __future__ import annotations

import html

from sparse_export.tables import visible

__all__ = ["escape"]


def escape(text: str) -> str:
    """Escape text for HTML, and show what a browser obeys or hides, as direction marks, as escapes."""
    return html.escape(visible(text))
