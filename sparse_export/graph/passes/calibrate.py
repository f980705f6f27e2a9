"""Ranges of the values of a network on samples, measured by onnxruntime's calibrators."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnx

from sparse_export.errors import UsageError
from sparse_export.files import temporary_folder
from sparse_export.onnxruntime_import import load_onnxruntime
from sparse_export.signature import Feeds

__all__ = ["METHODS", "RangeMethod", "largest_magnitudes", "require_samples"]

RangeMethod = Literal["max", "percentile", "entropy"]
METHODS: tuple[RangeMethod, ...] = ("max", "percentile", "entropy")
_PERCENTILE = 99.99
_BINS = 2048
_LEVELS = 128
_LEAST = 1e-30  # of a range, where all values are zero


def require_samples(samples: Sequence[Feeds]) -> None:
    """Check that there is something to take ranges from.

    Raises:
        UsageError: there is not.
    """
    if not samples or not all(array.size for feeds in samples for array in feeds.values()):
        raise UsageError(
            "There is nothing to calibrate on.",
            expected="Samples of the training set were expected.",
            do="Build from a run that names its data, or choose fp16.",
        )


def largest_magnitudes(
    model: onnx.ModelProto, values: Collection[str], samples: Sequence[Feeds], method: RangeMethod
) -> dict[str, float]:
    """Measure how large the values of a float32 network become.

    Args:
        model: the network.
        values: names of float values, inputs among them.
        samples: batches of its inputs.
        method: `max` for the largest magnitude; `percentile` for the one that 99.99 % of a value's entries stay
            below; `entropy` for the bound whose levels lose least information.

    Returns:
        The magnitude of each value; of those that onnxruntime does not measure, none.
    """
    calibrate = load_onnxruntime("onnxruntime.quantization.calibrate")
    copy = onnx.ModelProto()
    copy.CopyFrom(onnx.shape_inference.infer_shapes(model))
    _name_types(copy, values)
    with temporary_folder() as folder:
        source, augmented = folder / "float.onnx", folder / "augmented.onnx"
        onnx.save(copy, source)
        calibrator = _calibrator(calibrate, method, str(source), str(augmented))
        chosen = _named(values)
        calibrator.select_tensors_to_calibrate = chosen
        calibrator.augment_graph()
        calibrator.create_inference_session()
        if method != "max":
            largest = largest_magnitudes(model, values, samples, "max")
            calibrator.collector = _histograms(calibrate, calibrator, method, largest)
        with contextlib.redirect_stdout(io.StringIO()):  # the calibrators print what they do
            for feeds in samples:
                # One batch at a time: they keep every value of what they are given at once.
                calibrator.collect_data(_reader(calibrate, feeds))
            found: Mapping[str, Any] = calibrator.compute_data().data
    return {name: _magnitude(one) for name, one in found.items()}


def _calibrator(calibrate: Any, method: RangeMethod, source: str, augmented: str) -> Any:
    if method == "max":
        return calibrate.MinMaxCalibrater(source, augmented_model_path=augmented, symmetric=True)
    if method == "percentile":
        return calibrate.PercentileCalibrater(
            source, augmented_model_path=augmented, symmetric=True, num_bins=_BINS, percentile=_PERCENTILE
        )
    return calibrate.EntropyCalibrater(
        source,
        augmented_model_path=augmented,
        symmetric=True,
        num_bins=_BINS,  # with 512 MiniLM was 0.26 of the spread off instead of 0.12
        num_quantized_bins=_LEVELS,
    )


def _histograms(calibrate: Any, calibrator: Any, method: RangeMethod, largest: Mapping[str, float]) -> Any:
    """Empty histograms over the range of each value. Of their own they begin at the range of the first batch and
    grow by bins of that width: a value far out in a later batch would make millions.
    """
    collector = calibrate.HistogramCollector(
        method=method,
        symmetric=True,
        num_bins=calibrator.num_bins,
        num_quantized_bins=calibrator.num_quantized_bins,
        percentile=calibrator.percentile,
        scenario="same",
    )
    n = calibrator.num_bins
    for name, one in largest.items():
        top = np.float32(max(one, _LEAST))
        bottom = np.float32(0.0) if method == "percentile" else -top
        edges = np.linspace(bottom, top, n + 1, dtype=np.float32)
        ends = (bottom, top) if method == "percentile" else (bottom, top, top)
        collector.histogram_dict[name] = (np.zeros(n, np.int64), edges, *ends)
    return collector


def _named(values: Collection[str]) -> Any:
    """The selection that a calibrator makes, with these names alone."""

    def select(model: onnx.ModelProto) -> tuple[list[str], dict[str, onnx.ValueInfoProto]]:
        infos = {one.name: one for one in (*model.graph.value_info, *model.graph.input, *model.graph.output)}
        return sorted(name for name in values if name in infos), infos

    return select


def _name_types(model: onnx.ModelProto, values: Collection[str]) -> None:
    """Tell the type of values that shape inference did not reach, in place: all are float32."""
    graph = model.graph
    known = {one.name for one in (*graph.value_info, *graph.input, *graph.output)}
    for name in sorted(set(values) - known):
        graph.value_info.add(name=name).type.tensor_type.elem_type = onnx.TensorProto.FLOAT


def _reader(calibrate: Any, feeds: Feeds) -> Any:
    base: Any = calibrate.CalibrationDataReader

    class Reader(base):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self._batches: Iterator[Feeds] = iter([feeds])

        def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
            found = next(self._batches, None)
            return None if found is None else dict(found)

    return Reader()


def _magnitude(found: Any) -> float:
    """The larger side of a range."""
    lowest, highest = (np.asarray(one, dtype=np.float64).ravel() for one in found.range_value)
    return float(max(np.abs(lowest).max(initial=0.0), np.abs(highest).max(initial=0.0)))
