"""The tables of docs/networks.md, out of what `benchmarks.networks` measured.

python -m benchmarks.network_tables benchmarks/results/2026-11-30-networks.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.networks import ALL_NETWORKS

_NONE = "-"
_WHAT = ("network", "layers", "2:4", "fp16 can use", "kept, %", "MB, dense → packed → fp16", "engine, MB")
_HOW = ("network", "samples", "magnitude", "reconstruction", "fp16 off by", "served", "seconds")


def tables(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown of both tables: what became of the layers and files, and how far the outputs moved.

    Args:
        rows: the results by network, as the JSON has them.
    """
    known = [rows[name] for name in ALL_NETWORKS if name in rows]
    made = [row for row in known if row["n_layers"]]
    return "\n\n".join(
        (
            _markdown(_WHAT, [_sizes(row) for row in made]),
            _markdown(_HOW, [_outputs(row) for row in made]),
            *(f"{row['name']}, {link}: {why}" for row in known for link, why in row["stops"].items()),
        )
    )


def _sizes(row: Mapping[str, Any]) -> list[str]:
    kept = [row["kept_by_magnitude"], row["kept_share"]]
    files = [row["dense_bytes"], row["packed_bytes"], row["half_bytes"]]
    eligible = row["n_eligible"]
    return [
        row["name"],
        str(row["n_layers"]),
        str(row["n_two_four"]),
        _NONE if eligible is None else str(eligible),
        " / ".join(_NONE if one is None else f"{100 * one:.1f}" for one in kept),
        " → ".join(map(_megabytes, files)),
        _megabytes(row["engine_bytes"]),
    ]


def _outputs(row: Mapping[str, Any]) -> list[str]:
    sparse = row["agreement"].get("packed") or row["agreement"].get("sparse")
    half = row["difference"].get("half")
    served, seconds = row["served"], row["seconds"]
    first = [f"sparsify, {method}" for method in ("magnitude", "reconstruction")]
    made = [seconds[link] for link in first if link in seconds]
    rest = sum(took for link, took in seconds.items() if link not in first)
    return [
        row["name"],
        f"{row['n_calibration']} + {row['n_held_out']}",
        _interval(row["agreement"].get("by-magnitude")),
        _interval(sparse),
        _NONE if half is None else f"{half:.1e}",
        _NONE if not served else "same bits" if not any(served.values()) else f"{max(served.values()):.1e}",
        " / ".join(f"{one:.0f}" if one >= 10 else f"{one:.1f}" for one in (*made, rest)),
    ]


def _interval(found: Sequence[float] | None) -> str:
    return _NONE if found is None else f"{found[0]:.1f} [{found[1]:.1f}, {found[2]:.1f}]"


def _megabytes(size: int | None) -> str:
    return _NONE if size is None else f"{size / 1e6:.2f}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    print(tables(json.loads(Path(sys.argv[1]).read_text())["networks"]))
