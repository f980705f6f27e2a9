"""Times dense and 2:4 products of the sizes that a network has."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_export.formats.timings import ProductTiming, Size, Timings
from sparse_export.instruments.card import CardLog, watched_cards
from sparse_export.instruments.device import CudaStamps, captured, replayed, stamps_for
from sparse_export.instruments.interleave import LatencyResult, measure_interleaved
from sparse_export.instruments.machine import machine_facts
from sparse_export.models.search24 import best_algorithms
from sparse_export.sparsity.compressed import TWO_FOUR
from sparse_export.sparsity.pattern import largest_per_group
from sparse_export.sparsity.product24 import Backend, compress, fill, multiply
from sparse_export.version import library_versions, now

__all__ = [
    "ProductCalls",
    "measure_timings",
    "per_product",
    "product_calls",
]

_MOST_COPIES = 128


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

    Each product has a bias, random values and, on cuSPARSELt, the fastest algorithm for its rows.

    Args:
        model: the network, which is moved to the device and cast in place.
        input_shape: of one sample.
        sizes: of the products.
        name: of the network, for the record.
        batch: samples in a call.
        dtype: of the products.
        backend: of the 2:4 products.
        device: to time.
        rounds: as of `measure_interleaved`, as are the next two.
        block_s: seconds of a block.
        warmup_limit_s: seconds.
        on_progress: called with a line for people.

    Raises:
        MissingCapability: the device has no such product.
    """
    report = on_progress or (lambda line: None)
    machine = machine_facts()
    stamps = stamps_for(device.type)
    options: dict[str, Any] = {
        "batch": batch,
        "rounds": rounds,
        "block_s": block_s,
        "warmup_limit_s": warmup_limit_s,
        "time_calls": stamps.time_calls if isinstance(stamps, CudaStamps) else None,
    }
    best_algorithms([(size[:2], size[2]) for size in sizes], dtype, backend, device)  # all by one search
    products = []
    with watched_cards() as cards, torch.inference_mode():
        for size in sorted(set(sizes)):
            report(f"a product of {size[0]} outputs, {size[1]} inputs and {size[2]} rows")
            made = product_calls(size, dtype, backend, device)
            found = measure_interleaved(made.calls, **options)
            products.append(_timing(size, per_product(found, made.n_inside), made.algorithm))
        report("the dense network")
        network = model.to(device, dtype).eval()
        x = torch.randn((batch, *input_shape), device=device, dtype=dtype)
        call: Callable[[], object] = lambda: network(x)
        if device.type == "cuda":
            call = replayed(call)
        whole = measure_interleaved({"model": call}, **options)["model"]
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


@dataclass(frozen=True, kw_only=True)
class ProductCalls:
    """A product of one size, `dense` and `sparse`, of the same values, ready to be timed.

    Attributes:
        calls: by name, each makes `n_inside` products.
        outputs: by name, each makes one product and returns it.
        n_inside: products in a call.
        algorithm: cuSPARSELt's for this size.
        how: `cuda graph`; or `eager`, on a GPU with the reason.
    """

    calls: dict[str, Callable[[], object]]
    outputs: dict[str, Callable[[], Tensor]]
    n_inside: int
    algorithm: int
    how: str


def product_calls(size: Size, dtype: torch.dtype, backend: Backend, device: torch.device) -> ProductCalls:
    """Prepare the product of one size. This times the device, to choose the algorithm.

    On a GPU a call replays a CUDA graph, so that no launch is timed, of products with as many copies of the
    weight as fill the L2 cache twice: in a network a weight is no longer in the cache when it is needed
    again.

    Args:
        size: outputs, inputs and rows.
        dtype: of the product.
        backend: of the 2:4 product.
        device: to time.
    """
    n_outputs, n_inputs, n_rows = size
    scores = torch.randn((n_outputs, n_inputs), device=device)
    mask = largest_per_group(scores, 1, TWO_FOUR)
    weight = (scores * mask).to(dtype)
    bias = torch.randn(n_outputs, device=device).to(dtype)
    x = torch.randn((n_rows, n_inputs), device=device).to(dtype)
    made = compress(mask, dtype, backend)
    fill(made, weight)
    (algorithm,) = best_algorithms([((n_outputs, n_inputs), n_rows)], dtype, backend, device)

    def dense(weight: Tensor) -> Tensor:
        return nn.functional.linear(x, weight, bias)

    def sparse(packed: Tensor, meta: Tensor | None) -> Tensor:
        return multiply(x, packed, meta, bias, shape=made.shape, backend=backend, algorithm=algorithm)

    outputs: dict[str, Callable[[], Tensor]] = {
        "dense": partial(dense, weight),
        "sparse": partial(sparse, made.packed, made.meta),
    }
    if device.type != "cuda":
        return ProductCalls(
            calls=dict(outputs), outputs=outputs, n_inside=1, algorithm=algorithm, how="eager"
        )
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    n_copies = min(_MOST_COPIES, max(1, -(-2 * cache // (weight.numel() * weight.element_size()))))
    copies = {
        "dense": [partial(dense, weight.clone()) for _ in range(n_copies)],
        "sparse": [
            partial(sparse, made.packed.clone(), None if made.meta is None else made.meta.clone())
            for _ in range(n_copies)
        ],
    }
    try:
        calls = {name: captured(some) for name, some in copies.items()}
    except RuntimeError as cause:
        torch.cuda.synchronize()
        how = f"eager, since capture failed: {str(cause).splitlines()[0]}"
        return ProductCalls(calls=dict(outputs), outputs=outputs, n_inside=1, algorithm=algorithm, how=how)
    return ProductCalls(
        calls=calls, outputs=outputs, n_inside=n_copies, algorithm=algorithm, how="cuda graph"
    )


def per_product(found: dict[str, LatencyResult], n_inside: int) -> dict[str, tuple[float, ...]]:
    """Divide the times of calls by their number of products.

    Args:
        found: times of the calls, by name.
        n_inside: products in a call.

    Returns:
        By name, ms of one product in each round.
    """
    return {name: tuple(ms / n_inside for ms in one.samples_ms) for name, one in found.items()}


def _timing(size: Size, found: dict[str, tuple[float, ...]], algorithm: int) -> ProductTiming:
    """The record of one size."""
    return ProductTiming(
        n_outputs=size[0],
        n_inputs=size[1],
        n_rows=size[2],
        dense_ms=found["dense"],
        sparse_ms=found["sparse"],
        algorithm=algorithm,
    )
