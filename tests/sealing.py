"""Documents of a run or a bundle that a test changed: sealed as the program seals its own, or as old releases."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_export.formats.document import DIGEST, document_digest


def write_sealed(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON object, sealed as the program seals its own."""
    path.write_text(json.dumps({**document, DIGEST: document_digest(document)}))


def first_version(document: Mapping[str, Any], names: tuple[str, str] = ("x", "y")) -> dict[str, Any]:
    """The document of digits-cnn as releases before the signature wrote it. names: of input and output."""
    new = ("signature", "task", "dense", "digest", "golden")
    old = {key: value for key, value in document.items() if key not in new}
    ends = {"input_name": names[0], "output_name": names[1]} if "golden" in document else {}
    shapes = {"model": {"name": "digits-cnn", "input_shape": [1, 8, 8], "n_classes": 10}}
    return old | ends | shapes | {"schema_version": 1}
