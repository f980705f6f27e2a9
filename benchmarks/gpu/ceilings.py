"""Part `ceilings`: what the card can do at best."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import Case, measured, ratios
from sparse_export.instruments.statistics import location
from sparse_export.plan.timing import product_calls


def ceilings(setting: Setting) -> Iterator[Case]:
    """Time copies, then square matrix products.

    Args:
        setting: of the session.

    Yields:
        A case for the bandwidth, then one for each type and backend.
    """
    source = torch.zeros(setting.bandwidth_mib * 2**20, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    found = measured(setting, {"copy": lambda: target.copy_(source)}, 1)["copy"]
    ms = location(found.samples_ms).estimate
    yield {"what": "copy", "gb_per_s": 2 * source.numel() / ms / 1e6, "samples_ms": list(found.samples_ms)}
    n = setting.square
    for dtype in setting.dtypes:
        for backend in setting.backends:
            made = product_calls((n, n, n), dtype, backend, torch.device(setting.device))
            case = ratios(measured(setting, made.calls, n), n_inside=made.n_inside)
            rates = {name: 2 * n**3 / ms / 1e9 for name, ms in case["ms"].items()}  # of dense work, 2:4's too
            yield (
                {"what": "matrix rate", "dtype": str(dtype), "backend": backend, "size": n}
                | case
                | {"tflops": rates, "algorithm": made.algorithm, "how": made.how}
            )
