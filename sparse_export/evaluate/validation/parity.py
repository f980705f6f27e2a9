"""How far what a bundle gives is from what was stored with it or computed beside it."""

from __future__ import annotations

import io

import numpy as np
from torch import nn

from sparse_export.building.golden import SMALLER_BATCHES, answers, difference
from sparse_export.errors import ArtefactError, GateFailed, UsageError
from sparse_export.evaluate.validation.result import BatchParity, Parity
from sparse_export.formats.bundle import GOLDEN_INPUT, GOLDEN_OUTPUT, MODEL_FILE, Bundle
from sparse_export.formats.listed import bytes_of
from sparse_export.runtimes.logits import Array, onnx_logits
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.runtimes.probe import require_tried
from sparse_export.runtimes.tolerance import outside_tolerance, spread
from sparse_export.tasks.labels import has_class_scores, predicted_classes
from sparse_export.trust import Given

__all__ = ["golden", "golden_parity", "parity_by_batch", "parity_of"]


def golden_parity(bundle: Bundle, *, n_threads: int | None = None, trust: Given = None) -> Parity:
    """The ONNX file by onnxruntime on the CPU against the stored answer, after `require_tried`.

    Raises GateFailed (NaN, or logits of another shape) or ArtefactError."""
    require_tried(bundle, given=trust)
    golden_input, golden_output = (golden(bundle, name) for name in (GOLDEN_INPUT, GOLDEN_OUTPUT))
    try:
        found = onnx_logits(bundle.onnx_path, golden_input, n_threads=n_threads)
    except UsageError as cause:
        raise ArtefactError(
            f"{bundle.path / GOLDEN_INPUT} does not fit {bundle.path / MODEL_FILE}. {cause.what}",
            expected=cause.expected,
            do="Build the bundle again.",
        ) from cause
    return parity_of(found, golden_output, bundle)


def golden(bundle: Bundle, name: str) -> Array:
    try:
        array: Array = np.load(io.BytesIO(bytes_of(bundle, name)), allow_pickle=False)
    except (ValueError, EOFError, OSError) as cause:
        raise ArtefactError(
            f"{bundle.path / name} cannot be read: {cause}.",
            expected="A NumPy array was expected.",
            do="Rebuild it.",
        ) from cause
    return array


def parity_by_batch(
    bundle: Bundle, network: nn.Module, *, n_threads: int | None = None
) -> tuple[BatchParity, ...]:
    """The ONNX file by onnxruntime on the CPU against its network, on the golden input in batches of each size.

    Raises UsageError where the network does not take a batch."""
    inputs, outputs = (golden(bundle, name) for name in (GOLDEN_INPUT, GOLDEN_OUTPUT))
    allowed = bundle.info.atol + bundle.info.rtol * spread(outputs)
    sizes = (*(n for n in SMALLER_BATCHES if n < len(inputs)), len(inputs))
    with open_session(bundle.onnx_path, n_threads=n_threads) as session:
        differences = {
            n: difference(session, inputs[:n], wanted)
            for n, wanted in answers(network, inputs, sizes).items()
        }
    return tuple(
        BatchParity(batch=n, max_abs_difference=one, ok=one is not None and one <= allowed)
        for n, one in differences.items()
    )


def parity_of(found: Array, wanted: Array, bundle: Bundle) -> Parity:
    if found.shape != wanted.shape:
        raise GateFailed(
            f"{bundle.path / MODEL_FILE} gives logits {found.shape}.",
            expected=f"{wanted.shape} was expected.",
        )
    agreement = None
    if has_class_scores(found):
        agreement = float((predicted_classes(found) == predicted_classes(wanted)).mean())
    largest, outside = outside_tolerance(found, wanted, atol=bundle.info.atol, rtol=bundle.info.rtol)
    whole = spread(wanted)
    return Parity(
        n_samples=len(wanted),
        max_abs_difference=largest,
        max_relative_difference=largest / whole if whole else 0.0,
        top1_agreement=agreement,
        ok=not outside,
    )
