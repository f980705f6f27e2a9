"""Ways to leave inactive weights out of a training step's three products on the CPU, against the dense
products.

    python -m benchmarks.bench_csr [--size 4096,4096] [--batch 128] [--density 0.05] [--rounds 20] [--threads
    1] [--json FILE]

All ways of one product in interleaved blocks; the ratio to the dense product is paired by round, with its 95
% interval.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_export.instruments.interleave import measure_interleaved
from sparse_export.instruments.machine import machine_facts
from sparse_export.instruments.pinning import pinned
from sparse_export.instruments.statistics import paired_ratio
from sparse_export.sparsity.csr import (
    CsrForm,
    csr_form,
    gather,
    gradient_at,
    multiply,
    multiply_transposed,
    scatter,
)
from sparse_export.version import command_line, library_versions, now

_CHUNK = 2048  # gathered rows of 128 floats: 2 MB for both factors


def gradient_by_chunks(form: CsrForm, rows: Tensor, gy_ON: Tensor, x_IN: Tensor) -> Tensor:
    """`gradient_at`, by gathering the rows of both factors, some entries at a time."""
    parts = [
        (gy_ON.index_select(0, r) * x_IN.index_select(0, c)).sum(1)
        for r, c in zip(rows.split(_CHUNK), form.col.split(_CHUNK), strict=True)
    ]
    return torch.cat(parts)


def ways(n_out: int, n_in: int, n_rows: int, density: float) -> dict[str, dict[str, Callable[[], object]]]:
    """The ways of each product, the dense one first."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand((n_out, n_in), generator=generator) < density
    weight = torch.randn((n_out, n_in), generator=generator) * mask
    x = torch.randn((n_rows, n_in), generator=generator)
    gy = torch.randn((n_rows, n_out), generator=generator)
    x_IN, gy_ON = x.t().contiguous(), gy.t().contiguous()
    form = csr_form(mask)
    values = gather(form, weight)
    multiply(form, values, x_IN)  # silences torch's one warning of CSR's being a beta feature
    rows = torch.repeat_interleave(torch.arange(n_out), form.crow.diff().long()).int()
    wide = torch.sparse_csr_tensor(
        form.crow.long(), form.col.long(), values, size=form.shape, check_invariants=False
    )
    flat = torch.zeros(n_out, n_in)
    return {
        "forward": {
            "dense": lambda: torch.nn.functional.linear(x, weight),
            "CSR": lambda: multiply(form, values, x_IN),
            "CSR, input transposed at each call": lambda: multiply(form, values, x.t()),
            "CSR with 64-bit indices": lambda: wide @ x_IN,
        },
        "gradient of the input": {
            "dense": lambda: gy @ weight,
            "CSR of the transpose, values gathered": lambda: multiply_transposed(form, values, gy_ON),
            "CSR of the transpose, made anew": lambda: weight.t().contiguous().to_sparse_csr() @ gy_ON,
        },
        "gradient of the weight": {
            "dense": lambda: gy.t() @ x,
            "sampled_addmm": lambda: gradient_at(form, gy_ON, x_IN),
            "rows gathered in chunks": lambda: gradient_by_chunks(form, rows, gy_ON, x_IN),
            "dense product, then gathered": lambda: gather(form, gy_ON @ x_IN.t()),
        },
        "active weights": {
            "gathered from the weight": lambda: gather(form, weight),
            "put into the weight": lambda: scatter(form, values, flat),
            "structure made from the mask": lambda: csr_form(mask),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="4096,4096", help="outputs,inputs")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    n_out, n_in = map(int, arguments.size.split(","))
    machine = machine_facts()
    torch.set_num_threads(arguments.threads)
    products: dict[str, Any] = {}
    with pinned(arguments.threads) as cores:
        for product, calls in ways(n_out, n_in, arguments.batch, arguments.density).items():
            products[product] = measured(product, calls, arguments.batch, arguments.rounds)
    if arguments.json:
        facts = {
            "command": command_line(),
            "date": now(),
            "machine": machine,
            "versions": library_versions(),
            "threads": arguments.threads,
            "cores": cores,
            "size": [n_out, n_in],
            "batch": arguments.batch,
            "density": arguments.density,
        }
        arguments.json.write_text(json.dumps(facts | {"products": products}, indent=2) + "\n")


def measured(
    product: str, calls: Mapping[str, Callable[[], object]], batch: int, rounds: int
) -> dict[str, Any]:
    """Print and return times of each way, and ratios to the dense product where there is one."""
    results = measure_interleaved(calls, batch=batch, rounds=rounds, warmup_limit_s=3.0)
    print(product)
    found: dict[str, Any] = {}
    for name, result in results.items():
        found[name] = {"latency": asdict(result)}
        line = f"  {name:40} {result.median_ms:9.2f} ms"
        if "dense" in results and name != "dense":
            ratio = paired_ratio(results["dense"].samples_ms, result.samples_ms)
            found[name]["dense_over_this"] = asdict(ratio)
            line += f"   dense / this {ratio.estimate:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
        print(line, flush=True)
    return found


if __name__ == "__main__":
    main()
