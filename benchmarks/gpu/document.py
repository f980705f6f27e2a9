"""What a session measured, written to files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write(folder: Path, stem: str, document: dict[str, Any]) -> None:
    """Write the document, its table and the samples.

    Args:
        folder: is made if it is not there.
        stem: of the names of the files.
        document: with samples inside.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken: list[Any] = []
    light = without_samples(document, taken)
    (folder / f"{stem}.json").write_text(json.dumps(light, indent=1) + "\n")
    (folder / f"{stem}.md").write_text(summary(document))
    with gzip.open(folder / f"{stem}-samples.json.gz", "wt") as stream:
        json.dump(taken, stream)


def summary(document: Mapping[str, Any]) -> str:
    """A table of every ratio, for people."""
    lines = [f"# {document['card']}, {document['date']}", "", document["note"], ""]
    lines += ["| part | case | ratio | 95 % | floor |", "|---|---|---|---|---|"]
    for part, found in document["parts"].items():
        if found["problem"]:
            lines.append(f"| {part} | {found['problem'].splitlines()[-1]} | | | |")
        for case in found["cases"]:
            what = ", ".join(
                f"{key} {value}"
                for key, value in case.items()
                if isinstance(value, str | int | bool) and (key != "steady" or not value)
            )
            if isinstance(case.get("how"), dict):
                what += f", {' and '.join(sorted(set(case['how'].values())))}"
            shown = {key: value for key, value in case.items() if key.startswith("dense / ")}
            floor = f"{case['floor']:.3f}" if "floor" in case else ""
            for key, ratio in shown.items():
                interval = f"[{ratio['low']:.3f}, {ratio['high']:.3f}]"
                lines.append(f"| {part} | {what}: {key} | {ratio['estimate']:.3f} | {interval} | {floor} |")
            if not shown:
                rate = f"{case['gb_per_s']:.0f} GB/s" if "gb_per_s" in case else ""
                lines.append(f"| {part} | {what} | {rate} | | |")
    return "\n".join(lines) + "\n"


def without_samples(value: Any, taken: list[Any]) -> Any:
    """Take the samples out of a document.

    Args:
        value: the document, or a part of it.
        taken: samples so far; those of this value are appended.

    Returns:
        The value with each `samples_ms` replaced by `samples`, the index in `taken`.
    """
    if isinstance(value, dict):
        result = {}
        for key, below in value.items():
            if key == "samples_ms":
                result["samples"] = len(taken)
                taken.append(below)
            else:
                result[key] = without_samples(below, taken)
        return result
    if isinstance(value, list):
        return [without_samples(below, taken) for below in value]
    return value
