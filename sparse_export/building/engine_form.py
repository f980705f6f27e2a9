"""The quantized graph that engines are built of, by the ranges that give the least error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from sparse_export.engines.options import Precision
from sparse_export.engines.precision import CALIBRATED
from sparse_export.files import temporary_folder
from sparse_export.graph.model import save_model
from sparse_export.graph.passes.calibrate import METHODS, RangeMethod
from sparse_export.graph.passes.migrate_scales import with_migrated_scales
from sparse_export.graph.passes.quantize_typed import quantized_for_engines
from sparse_export.graph.quantized_ends import quantized_ends
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.runtimes.tolerance import differences
from sparse_export.signature import Feeds, Signature

__all__ = ["EngineForm", "engine_form"]

# As a share of the spread: below it the other ranges, of which entropy takes far longer, are not tried.
# CNNs stay below with the largest magnitudes (ResNet-18 0.027, digits-cnn 0.007), MiniLM does not (0.42, with
# entropy 0.12; onnxruntime 1.31.1, 2026-11-30).
_GOOD = 0.05
_MIGRATED = "migrated"


@dataclass(frozen=True, kw_only=True)
class EngineForm:
    """A graph for engines.

    Attributes:
        model: strongly typed, float32 at its inputs and outputs.
        ranges: how they were taken.
        migrated: were scales of channels moved into the weights behind normalizations?
        rms: by each way that was tried, the error on the first samples: the root mean square by the spread,
            of the output where it is largest.
        n_products: Conv, Gemm and MatMul nodes, those without weights too.
        n_quantized: those that read and write quantized values.
    """

    model: onnx.ModelProto
    ranges: RangeMethod
    migrated: bool
    rms: Mapping[str, float]
    n_products: int
    n_quantized: int


def engine_form(
    model: onnx.ModelProto,
    signature: Signature,
    samples: Sequence[Feeds],
    precision: Precision,
    *,
    migrate: bool = True,
) -> EngineForm | None:
    """Make the graph for engines of a float32 graph.

    Args:
        model: already sparse: ranges are those of the network that ships.
        signature: of it.
        samples: batches of inputs that ranges are taken from; the error is measured on the first batch.
        precision: of the engines.
        migrate: try to move scales into weights too, where ranges alone leave a large error.

    Returns:
        The graph with the least error; None for a precision without ranges, whose graph engines take.

    Raises:
        UsageError: as `quantized_for_engines`.
        GateFailed: likewise.
    """
    if precision not in CALIBRATED:
        return None
    assert precision == "int8" or precision == "fp8"
    wanted = _run(model, signature, samples[0]) if samples else {}
    found: dict[str, onnx.ModelProto] = {}
    rms: dict[str, float] = {}
    for method in METHODS:
        found[method] = quantized_for_engines(model, samples, precision, method=method)
        rms[method] = _error(_run(found[method], signature, samples[0]), wanted)
        if rms[method] <= _GOOD:
            break
    ranges = min(METHODS[: len(rms)], key=lambda method: rms[method])
    if migrate and rms[ranges] > _GOOD:
        moved = with_migrated_scales(model, samples)
        if moved != model:
            found[_MIGRATED] = quantized_for_engines(moved, samples, precision, method=ranges)
            rms[_MIGRATED] = _error(_run(found[_MIGRATED], signature, samples[0]), wanted)
    best = min(rms, key=lambda way: rms[way])
    ends = quantized_ends(found[best])
    return EngineForm(
        model=found[best],
        ranges=ranges,
        migrated=best == _MIGRATED,
        rms=rms,
        n_products=len(ends),
        n_quantized=sum(one.holds for one in ends),
    )


def _run(model: onnx.ModelProto, signature: Signature, feeds: Feeds) -> Feeds:
    with temporary_folder() as folder:
        file = folder / "model.onnx"
        save_model(model, file)
        with open_session(file, signature=signature) as session:
            return session.run(feeds)


def _error(found: Feeds, wanted: Feeds) -> float:
    """Of the output that is farthest off; infinite where one is NaN or has another shape."""
    compared = differences(found, wanted, atol=0.0, rtol=1.0)
    errors = [one.rms_difference for one in compared if one.rms_difference is not None]
    worst = max(errors, default=0.0)
    return float("inf") if any(map(math.isnan, errors)) else worst
