"""A timings file, by `plan`: dense and 2:4 products of the sizes that a network has, timed on one card."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sparse_export.errors import ArtefactError
from sparse_export.files import write_json
from sparse_export.formats.document import SCHEMA_VERSION, read_document

Size = tuple[int, int, int]
"""Outputs, inputs and rows of a product."""


@dataclass(frozen=True, kw_only=True)
class ProductTiming:
    """One size. dense_ms, sparse_ms: one value a round, of the same rounds, in the order of time."""

    n_outputs: int
    n_inputs: int
    n_rows: int
    dense_ms: tuple[float, ...]
    sparse_ms: tuple[float, ...]
    algorithm: int = 0

    @property
    def size(self) -> Size:
        return self.n_outputs, self.n_inputs, self.n_rows


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Content of a timings file.

    device: the card's name.  batch: that rows and model_ms belong to.  model_ms: the whole dense network, one value a
    round.
    """

    model: str | None
    device: str
    dtype: str
    backend: str
    batch: int
    model_ms: tuple[float, ...]
    products: tuple[ProductTiming, ...]
    machine: dict[str, Any]
    cards: dict[str, Any]
    versions: dict[str, str]
    created: str
    kind: Literal["timings"] = "timings"
    schema_version: int = SCHEMA_VERSION


def read_timings(path: Path) -> Timings:
    """Read a timings file. Raises ArtefactError when it is damaged, or its series are not paired."""
    timings: Timings = read_document(path, "timings", Timings)
    for product in timings.products:
        if len(product.dense_ms) != len(product.sparse_ms):
            raise ArtefactError(
                f"{path} has {len(product.dense_ms)} dense and {len(product.sparse_ms)} sparse rounds of the size "
                f"{product.size}.",
                expected="As many of each were expected, measured side by side.",
                do="Measure again.",
            )
    return timings


def write_timings(path: Path, timings: Timings) -> None:
    """Write a timings file. Raises OutputError."""
    write_json(path, asdict(timings))
