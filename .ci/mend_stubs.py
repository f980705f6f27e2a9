"""Mends the five lines of tensorrt-stubs 10.13 that are no Python, so that mypy can read the rest."""

import ast
import re
import sys
from pathlib import Path

MENDS = (
    (r"\bin: list\[", "in_: list["),  # a parameter that has the name of a keyword
    (r"(power: Weights = None, channel_axis: int)\)", r"\1 = ...)"),  # no default after defaults
)

path = Path(sys.argv[1]) / "tensorrt_bindings" / "tensorrt.pyi"
text = path.read_text(encoding="utf-8")
for pattern, replacement in MENDS:
    text = re.sub(pattern, replacement, text)
ast.parse(text)
path.write_text(text, encoding="utf-8")
