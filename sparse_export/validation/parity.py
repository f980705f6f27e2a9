"""How far what a bundle gives is from what was stored with it or computed beside it."""

from __future__ import annotations

import io

import numpy as np

from sparse_export.artefact import GOLDEN_INPUT, GOLDEN_OUTPUT, MODEL_FILE, Bundle, bytes_of
from sparse_export.data.labels import has_class_scores, predicted_classes
from sparse_export.errors import ArtefactError, GateFailed, UsageError
from sparse_export.runtime.logits import Array, onnx_logits
from sparse_export.runtime.tolerance import outside_tolerance, spread
from sparse_export.runtime.trial import require_tried
from sparse_export.trust import Given
from sparse_export.validation.result import Parity

__all__ = ["golden", "golden_parity", "parity_of"]


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
