"""Part `inference`: whole networks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import torch

from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import Case
from sparse_export import models
from sparse_export.instruments.statistics import location, paired_ratio
from sparse_export.plan.layers import products_of
from sparse_export.plan.planning import make_plan
from sparse_export.plan.timing import measure_timings
from sparse_export.plan.whole import measure_whole, prepare


def inference(setting: Setting) -> Iterator[Case]:
    """Networks with random weights: dense, 2:4 wherever possible, and as a plan chooses."""
    for name, shape, dtype, batches in setting.networks:
        for batch in batches:
            torch._dynamo.reset()  # or the next batch size is compiled for any
            yield of_network(setting, name, shape, dtype, batch, compiled=batch == max(batches))


def of_network(
    setting: Setting, name: str, shape: tuple[int, ...], dtype: torch.dtype, batch: int, *, compiled: bool
) -> Case:
    """One network at one batch size."""
    device, backend = torch.device(setting.device), setting.backends[0]
    torch.manual_seed(0)
    network = models.create(name)
    layers = products_of(network.eval(), shape, batch, dtype, backend)
    possible = [one.name for one in layers if one.reason is None]
    prepare(network, possible, shape)
    timings = measure_timings(
        network,
        shape,
        {(one.n_outputs, one.n_inputs, one.n_rows or 0) for one in layers if one.reason is None},
        name=name,
        batch=batch,
        dtype=dtype,
        backend=backend,
        device=device,
        rounds=setting.rounds,
        block_s=setting.block_s / 2,
        warmup_limit_s=setting.warmup_limit_s / 4,
    )
    plan = make_plan(layers, timings, model=name, batch=batch, weights="random weights")
    found = measure_whole(
        network,
        shape,
        possible,
        plan.sparse,
        name=name,
        batch=batch,
        dtype=dtype,
        backend=backend,
        device=device,
        expected=plan.expected_speedup,
        compiled=compiled,
        rounds=setting.rounds,
        block_s=setting.block_s,
        warmup_limit_s=setting.warmup_limit_s,
    )
    ratios_found = {"dense again": found.control, "everywhere": found.everywhere, "planned": found.planned}
    return {
        "network": name,
        "batch": batch,
        "dtype": str(dtype),
        "backend": backend,
        "how": found.how,
        "compiled": found.compiled,
        "layers_24": found.n_possible,
        "layers_planned": found.n_planned,
        "expected_speedup": found.expected,
        "products": {
            " x ".join(map(str, product.size)): paired_ratio(product.dense_ms, product.sparse_ms).estimate
            for product in timings.products
        },
        "relative_difference": found.relative_difference,
        "samples_ms": found.samples_ms,
        "steady": found.steady,
        "ms": {kind: location(samples).estimate for kind, samples in found.samples_ms.items()},
        "floor": found.floor,
    } | {f"dense / {kind}": asdict(ratio) for kind, ratio in ratios_found.items() if ratio is not None}
