"""Part `products`: Linear layers of several sizes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import Case, measured, ratios
from sparse_export.formats.timings import Size
from sparse_export.models.search24 import best_algorithms
from sparse_export.plan.timing import ProductCalls, product_calls
from sparse_export.sparsity.product24 import why_not


def products(setting: Setting) -> Iterator[Case]:
    """Linear sizes at several numbers of rows."""
    dtype = setting.dtypes[0]
    for backend in setting.backends:
        sizes = [(shape, n_rows) for shape in setting.products for n_rows in setting.rows]
        best_algorithms(sizes, dtype, backend, torch.device(setting.device))  # all by one search
        for n_outputs, n_inputs in setting.products:
            reason = why_not((n_outputs, n_inputs), dtype, backend)
            if reason is not None:
                yield {"outputs": n_outputs, "inputs": n_inputs, "backend": backend, "why_dense": reason}
                continue
            for n_rows in setting.rows:
                size: Size = (n_outputs, n_inputs, n_rows)
                made = product_calls(size, dtype, backend, torch.device(setting.device))
                yield {
                    "outputs": n_outputs,
                    "inputs": n_inputs,
                    "rows": n_rows,
                    "backend": backend,
                    "dtype": str(dtype),
                    "relative_difference": difference(made),
                    "algorithm": made.algorithm,
                    "copies": made.n_inside,
                    "how": made.how,
                } | ratios(measured(setting, made.calls, n_rows), n_inside=made.n_inside)


def difference(made: ProductCalls) -> float:
    """Of the 2:4 product from the dense one, relative to its norm."""
    wanted, found = made.outputs["dense"]().double(), made.outputs["sparse"]().double()
    return float((found - wanted).norm() / wanted.norm())
