"""Which layers of a network train faster by CSR products, measured on the machine that trains."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_export.formats.run import ProductInfo
from sparse_export.models.layers_csr import why_not_linear
from sparse_export.models.modes import modes_kept
from sparse_export.sparsity.csr import csr_form, gather, gradient_at, multiply, multiply_transposed
from sparse_export.train.inputs import ModelInputs, called
from sparse_export.train.speed import input_of

__all__ = ["MOST_DENSITY", "choose_products"]

MOST_DENSITY = 0.1
"""Above this density products stay dense: there is little to win, and on some sizes something to lose."""

_LEAST_GAIN = 1.1  # smaller ones are within what short timings of one layer differ by
_ROUNDS = 5

Call = Callable[[], object]


def choose_products(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    sample: ModelInputs,
    *,
    most_density: float = MOST_DENSITY,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[ProductInfo, ...]:
    """Choose what to multiply by for each masked weight of a network in training on the CPU.

    A layer is timed where it is a Linear of a density up to most_density: the forward product, the gradient
    of the input and that of the weight, dense and by CSR in turn, with the threads that torch has now. CSR is
    chosen where it takes at most 1/1.1 of the dense time, in the median of five rounds.

    Args:
        model: the network.
        masks: bool, by parameter name.
        sample: a batch of inputs of the size that it is trained with; the network is run on it once, in
            evaluation.
        most_density: above this density products stay dense.
        clock: seconds, monotonic.

    Returns:
        For each masked weight the choice, its times and the reason.
    """
    reasons = why_not_linear(model)
    rows = _rows(model, sample)
    facts = []
    for name, mask in masks.items():
        density = int(torch.count_nonzero(mask)) / mask.numel()
        n_rows = rows.get(name.rpartition(".")[0])
        reason = reasons.get(name)
        if reason is None and density > most_density:
            reason = f"its density is {density:.3g}, above {most_density:g}"
        if reason is None and not n_rows:
            reason = "the network does not call its layer with a tensor"
        if reason is not None or not n_rows:
            facts.append(_fact(name, density, n_rows, None, reason or ""))
            continue
        times = _timed(model.get_parameter(name).detach(), mask, n_rows, clock)
        facts.append(_fact(name, density, n_rows, times, ""))
    return tuple(facts)


@dataclass(frozen=True, kw_only=True)
class _Times:
    dense_ms: float
    csr_ms: float
    ratio: float


def _fact(name: str, density: float, n_rows: int | None, times: _Times | None, reason: str) -> ProductInfo:
    wins = times is not None and times.ratio >= _LEAST_GAIN
    if times is not None:
        than = f"{times.csr_ms:.3g} ms by CSR, {times.dense_ms:.3g} ms dense"
        reason = f"timed at the start: {than}" + ("" if wins else f", not {_LEAST_GAIN:g} times as fast")
    return ProductInfo(
        name=name,
        by="csr" if wins else "dense",
        density=density,
        n_rows=n_rows,
        dense_ms=times.dense_ms if times else None,
        csr_ms=times.csr_ms if times else None,
        reason=reason,
    )


def _rows(model: nn.Module, sample: ModelInputs) -> dict[str, int]:
    """Rows of activations of each Linear layer by its name, at its last call."""
    rows: dict[str, int] = {}

    def note(name: str, x: object) -> None:
        if isinstance(x, Tensor) and x.ndim > 0:
            rows[name] = x.numel() // x.shape[-1]

    handles = [
        module.register_forward_pre_hook(
            lambda _, inputs, named, name=name: note(name, input_of(inputs, named)), with_kwargs=True
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad(), modes_kept(model):
            called(model.eval(), sample)
    finally:
        for handle in handles:
            handle.remove()
    return rows


@torch.no_grad()
def _timed(weight: Tensor, mask: Tensor, n_rows: int, clock: Callable[[], float]) -> _Times:
    generator = torch.Generator().manual_seed(0)
    n_out, n_in = weight.shape
    x_NI = torch.randn((n_rows, n_in), generator=generator, dtype=weight.dtype)
    gy_NO = torch.randn((n_rows, n_out), generator=generator, dtype=weight.dtype)
    form = csr_form(mask)
    values = gather(form, weight)

    def dense() -> None:
        nn.functional.linear(x_NI, weight)
        torch.mm(gy_NO, weight)
        torch.mm(gy_NO.t(), x_NI)

    def csr() -> None:
        x_IN, gy_ON = x_NI.t().contiguous(), gy_NO.t().contiguous()
        multiply(form, values, x_IN)
        multiply_transposed(form, values, gy_ON)
        gradient_at(form, gy_ON, x_IN)

    def seconds(call: Call) -> float:
        begin = clock()
        call()
        return clock() - begin

    dense()
    csr()
    pairs: list[tuple[float, float]] = []
    for n in range(_ROUNDS):
        if n % 2:
            csr_s = seconds(csr)
            dense_s = seconds(dense)
        else:
            dense_s = seconds(dense)
            csr_s = seconds(csr)
        pairs.append((dense_s, max(csr_s, 1e-9)))
    return _Times(
        dense_ms=1e3 * statistics.median(dense_s for dense_s, _ in pairs),
        csr_ms=1e3 * statistics.median(csr_s for _, csr_s in pairs),
        ratio=statistics.median(dense_s / csr_s for dense_s, csr_s in pairs),
    )
