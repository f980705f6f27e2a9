"""A timings file, by `plan`: dense and 2:4 products of a network's sizes, timed on one GPU."""

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
    """The times of a product of one size.

    Attributes:
        n_outputs: rows of the weight.
        n_inputs: columns of the weight.
        n_rows: rows of activations.
        dense_ms: one value a round, in the order of time.
        sparse_ms: one value a round, of the same rounds.
        algorithm: of the 2:4 product, as cuSPARSELt numbers them.
    """

    n_outputs: int
    n_inputs: int
    n_rows: int
    dense_ms: tuple[float, ...]
    sparse_ms: tuple[float, ...]
    algorithm: int = 0

    @property
    def size(self) -> Size:
        """Outputs, inputs and rows."""
        return self.n_outputs, self.n_inputs, self.n_rows


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Content of a timings file.

    Attributes:
        model: name of the network, None where it has none.
        device: name of the GPU.
        dtype: of the products.
        backend: of the 2:4 products.
        batch: samples in a call, to which `n_rows` and `model_ms` belong.
        model_ms: of the whole dense network, one value a round.
        products: one entry for each size.
        machine: the computer.
        cards: clocks and throttling of the GPUs meanwhile.
        versions: of the libraries.
        created: time in ISO 8601.
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
    """Read a timings file.

    Args:
        path: of the file.

    Raises:
        ArtefactError: it is damaged, or a size has not as many dense as sparse rounds.
    """
    timings: Timings = read_document(path, "timings", Timings)
    for product in timings.products:
        if len(product.dense_ms) != len(product.sparse_ms):
            raise ArtefactError(
                f"{path} has {len(product.dense_ms)} dense and {len(product.sparse_ms)} sparse rounds "
                f"of the size {product.size}.",
                do="Measure again.",
            )
    return timings


def write_timings(path: Path, timings: Timings) -> None:
    """Write a timings file.

    Args:
        path: of the file.
        timings: its content.

    Raises:
        OutputError: it cannot be written.
    """
    write_json(path, asdict(timings))
