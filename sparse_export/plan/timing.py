"""Times of dense and 2:4 products of the sizes that a network has: measured on a card, or read from a file."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparse_export.artefact import SCHEMA_VERSION, library_versions, now, read_document
from sparse_export.errors import ArtefactError
from sparse_export.files import write_json
from sparse_export.measure.card import CardLog, watched_cards
from sparse_export.measure.device import CudaStamps, stamps_for
from sparse_export.measure.interleave import LatencyResult, measure_interleaved
from sparse_export.measure.machine import machine_facts
from sparse_export.sparsity.compressed import TWO_FOUR
from sparse_export.sparsity.pattern import largest_per_group
from sparse_export.sparsity.product24 import Backend, best_algorithm, compress, fill, multiply

__all__ = [
    "ProductTiming",
    "Size",
    "Timings",
    "measure_timings",
    "product_calls",
    "read_timings",
    "write_timings",
]

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


def measure_timings(
    model: nn.Module,
    input_shape: tuple[int, ...],
    sizes: Collection[Size],
    *,
    name: str | None,
    batch: int,
    dtype: torch.dtype,
    backend: Backend,
    device: torch.device,
    rounds: int = 24,
    block_s: float = 0.02,
    warmup_limit_s: float = 5.0,
    on_progress: Callable[[str], None] | None = None,
) -> Timings:
    """Time every size dense and as 2:4 in interleaved blocks, and the dense network, on a device.

    The model is moved to the device and cast. Each product has a bias, random values and, on cuSPARSELt, the fastest
    algorithm for its rows. Raises MissingCapability where the device has no such product.
    """
    tell = on_progress or (lambda line: None)
    machine = machine_facts()
    stamps = stamps_for(device.type)
    options: dict[str, Any] = {
        "batch": batch,
        "rounds": rounds,
        "block_s": block_s,
        "warmup_limit_s": warmup_limit_s,
        "time_calls": stamps.time_calls if isinstance(stamps, CudaStamps) else None,
    }
    products = []
    with watched_cards() as cards, torch.inference_mode():
        for size in sorted(set(sizes)):
            tell(f"a product of {size[0]} outputs, {size[1]} inputs and {size[2]} rows")
            calls, algorithm = product_calls(size, dtype, backend, device)
            found = measure_interleaved(calls, **options)
            products.append(_timing(size, found, algorithm))
        tell("the dense network")
        network = model.to(device, dtype).eval()
        x = torch.randn((batch, *input_shape), device=device, dtype=dtype)
        whole = measure_interleaved({"model": lambda: network(x)}, **options)["model"]
    return Timings(
        model=name,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=str(dtype).removeprefix("torch."),
        backend=backend,
        batch=batch,
        model_ms=whole.samples_ms,
        products=tuple(products),
        machine=machine,
        cards=asdict(cards if cards.samples else CardLog(why_empty=cards.why_empty)),
        versions=library_versions(),
        created=now(),
    )


def product_calls(
    size: Size, dtype: torch.dtype, backend: Backend, device: torch.device
) -> tuple[dict[str, Callable[[], Tensor]], int]:
    """The product of one size, `dense` and `sparse`, of the same values, and cuSPARSELt's algorithm for it."""
    n_outputs, n_inputs, n_rows = size
    scores = torch.randn((n_outputs, n_inputs), device=device)
    mask = largest_per_group(scores, 1, TWO_FOUR)
    weight = (scores * mask).to(dtype)
    bias = torch.randn(n_outputs, device=device).to(dtype)
    x = torch.randn((n_rows, n_inputs), device=device).to(dtype)
    made = compress(mask, dtype, backend)
    fill(made, weight)
    algorithm = best_algorithm(made, n_rows)
    return {
        "dense": lambda: nn.functional.linear(x, weight, bias),
        "sparse": lambda: multiply(
            x, made.packed, made.meta, bias, shape=made.shape, backend=backend, algorithm=algorithm
        ),
    }, algorithm


def _timing(size: Size, found: dict[str, LatencyResult], algorithm: int) -> ProductTiming:
    return ProductTiming(
        n_outputs=size[0],
        n_inputs=size[1],
        n_rows=size[2],
        dense_ms=found["dense"].samples_ms,
        sparse_ms=found["sparse"].samples_ms,
        algorithm=algorithm,
    )
