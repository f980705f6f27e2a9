"""Writes the changed document of a run or a bundle with the digest that belongs to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_export.formats.document import DIGEST, document_digest


def write_sealed(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON object, sealed as the program seals its own."""
    path.write_text(json.dumps({**document, DIGEST: document_digest(document)}))
