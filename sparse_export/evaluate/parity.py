"""How far the outputs of a session are from those that were stored with the bundle, or computed beside it."""

from __future__ import annotations

import io

import numpy as np
from torch import nn

from sparse_export.building.golden import SMALLER_BATCHES, largest_difference, outputs_by_batch
from sparse_export.errors import ArtefactError, GateFailed, UsageError
from sparse_export.evaluate.validation import BatchParity, Parity
from sparse_export.formats.bundle import GOLDEN_INPUT, GOLDEN_OUTPUT, MODEL_FILE, Bundle
from sparse_export.formats.listed import bytes_of
from sparse_export.runtimes import Session
from sparse_export.runtimes.logits import Array, session_logits
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.runtimes.probe import require_probed
from sparse_export.runtimes.tolerance import outside_tolerance, spread
from sparse_export.tasks.labels import has_class_scores, predicted_classes
from sparse_export.trust import TrustedDigests

__all__ = ["golden_array", "golden_parity", "golden_parity_of_file", "parity_by_batch", "parity_of"]


def golden_parity(bundle: Bundle, *, n_threads: int | None = None, trust: TrustedDigests = None) -> Parity:
    """Hold the ONNX file, by onnxruntime on the CPU, against the stored answer, after `require_probed`.

    Args:
        bundle: to be checked.
        n_threads: of onnxruntime.
        trust: SHA-256 of a manifest that is vouched for.

    Raises:
        GateFailed: NaN, or logits of another shape.
        ArtefactError: files that cannot be read, or that do not fit each other.
    """
    require_probed(bundle, trusted=trust)
    with open_session(bundle.onnx_path, n_threads=n_threads) as session:
        return golden_parity_of_file(session, bundle)


def golden_parity_of_file(session: Session, bundle: Bundle) -> Parity:
    """As `golden_parity`, of an open session of the bundle's own ONNX file."""
    golden_input, golden_output = (golden_array(bundle, name) for name in (GOLDEN_INPUT, GOLDEN_OUTPUT))
    try:
        found = session_logits(session, golden_input, who=f"The ONNX file {bundle.onnx_path}")
    except UsageError as cause:
        raise ArtefactError(
            f"{bundle.path / GOLDEN_INPUT} does not fit {bundle.path / MODEL_FILE}. {cause.what}",
            expected=cause.expected,
            do="Build the bundle again.",
        ) from cause
    return parity_of(found, golden_output, bundle)


def golden_array(bundle: Bundle, name: str) -> Array:
    """Read the golden input or output.

    Raises:
        ArtefactError: the file is not the one that was written, or no array.
    """
    try:
        array: Array = np.load(io.BytesIO(bytes_of(bundle, name)), allow_pickle=False)
    except (ValueError, EOFError, OSError) as cause:
        raise ArtefactError(
            f"{bundle.path / name} cannot be read: {cause}.",
            expected="A NumPy array was expected.",
            do="Rebuild it.",
        ) from cause
    return array


def parity_by_batch(session: Session, bundle: Bundle, network: nn.Module) -> tuple[BatchParity, ...]:
    """How far a session is from the bundle's network, on the golden input in batches of each size.

    Raises:
        UsageError: the network does not take a batch.
    """
    inputs, outputs = (golden_array(bundle, name) for name in (GOLDEN_INPUT, GOLDEN_OUTPUT))
    allowed = bundle.info.atol + bundle.info.rtol * spread(outputs)
    sizes = (*(n for n in SMALLER_BATCHES if n < len(inputs)), len(inputs))
    differences = {
        n: largest_difference(session, inputs[:n], wanted)
        for n, wanted in outputs_by_batch(network, inputs, sizes).items()
    }
    return tuple(
        BatchParity(batch=n, max_abs_difference=one, ok=one is not None and one <= allowed)
        for n, one in differences.items()
    )


def parity_of(found: Array, wanted: Array, bundle: Bundle) -> Parity:
    """How far logits are from those that they should be, by the tolerances of the bundle.

    Raises:
        GateFailed: they have another shape.
    """
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
