"""How far the outputs of a session are from those that were stored with the bundle, or computed beside it."""

from __future__ import annotations

import io
import math

import numpy as np

from sparse_export.building.golden import SMALLER_BATCHES, outputs_by_batch
from sparse_export.errors import ArtefactError, GateFailed, UsageError
from sparse_export.evaluate.validation import BatchParity, Parity
from sparse_export.formats.bundle import MODEL_FILE, Bundle, BundleInfo
from sparse_export.formats.listed import bytes_of
from sparse_export.formats.run import CLASSIFICATION
from sparse_export.runtimes import Session
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.runtimes.outputs import outputs_of
from sparse_export.runtimes.probe import require_probed
from sparse_export.runtimes.tolerance import OutputDifference, differences
from sparse_export.signature import Array, Feeds, numpy_dtype
from sparse_export.tasks.labels import has_class_scores, predicted_classes
from sparse_export.tasks.samples import ArraySamples
from sparse_export.trust import TrustedDigests

__all__ = [
    "golden_inputs",
    "golden_outputs",
    "golden_parity",
    "golden_parity_of",
    "parity_by_batch",
    "parity_of",
]


def golden_parity(bundle: Bundle, *, n_threads: int | None = None, trust: TrustedDigests = None) -> Parity:
    """Hold the ONNX file, by onnxruntime on the CPU, against the stored answer, after `require_probed`.

    Args:
        bundle: to be checked.
        n_threads: of onnxruntime.
        trust: SHA-256 of a manifest that is vouched for.

    Raises:
        GateFailed: NaN, or outputs of another shape.
        ArtefactError: files that cannot be read, or that do not fit each other.
    """
    require_probed(bundle, trusted=trust)
    with open_session(
        bundle.onnx_path,
        signature=bundle.info.signature,
        inner=tuple(bundle.info.golden.inner),
        n_threads=n_threads,
    ) as session:
        return golden_parity_of(session, bundle, who=f"The ONNX file {bundle.onnx_path}")


def golden_parity_of(session: Session, bundle: Bundle, *, who: str = "") -> Parity:
    """As `golden_parity`, of an open session. Values inside the graph count where the session gives them."""
    inputs, wanted = golden_inputs(bundle), golden_outputs(bundle)
    given = session.signature.output_names
    wanted = {
        name: one for name, one in wanted.items() if name in given or name in bundle.info.golden.outputs
    }
    samples = ArraySamples(feeds=inputs, signature=bundle.info.signature)
    try:
        bundle.info.signature.require_feeds(inputs)
        found = outputs_of(session, samples, who=who)
    except UsageError as cause:
        raise ArtefactError(
            f"The golden input of {bundle.path} does not fit {bundle.path / MODEL_FILE}. {cause.what}",
            expected=cause.expected,
            do="Build the bundle again.",
        ) from cause
    return parity_of(found, wanted, bundle)


def golden_inputs(bundle: Bundle) -> dict[str, Array]:
    """Read the golden inputs, by name.

    Raises:
        ArtefactError: a file is not the one that was written, or no array.
    """
    dtypes = {one.name: one.dtype for one in bundle.info.signature.inputs}
    return {name: _array(bundle, file, dtypes.get(name)) for name, file in bundle.info.golden.inputs.items()}


def golden_outputs(bundle: Bundle) -> dict[str, Array]:
    """Read the golden outputs, and values inside the graph that stand for some, by name.

    Raises:
        ArtefactError: as `golden_inputs`.
    """
    golden = bundle.info.golden
    dtypes = {one.name: one.dtype for one in bundle.info.signature.outputs}
    files = {**golden.outputs, **golden.inner}
    return {name: _array(bundle, file, dtypes.get(name)) for name, file in files.items()}


def _array(bundle: Bundle, file: str, dtype: str | None) -> Array:
    try:
        array: Array = np.load(io.BytesIO(bytes_of(bundle, file)), allow_pickle=False)
    except (ValueError, EOFError, OSError) as cause:
        raise ArtefactError(
            f"{bundle.path / file} cannot be read: {cause}.",
            expected="A NumPy array was expected.",
            do="Rebuild it.",
        ) from cause
    return array.astype(numpy_dtype(dtype)) if dtype == "bfloat16" else array  # which NumPy does not store


def parity_by_batch(session: Session, bundle: Bundle, reference: Session) -> tuple[BatchParity, ...]:
    """How far a session is from the bundle's network, on the golden input in batches of each size.

    Args:
        session: of the bundle's file.
        bundle: whose golden input is run.
        reference: of the network.

    Raises:
        UsageError: the network does not take a batch.
    """
    inputs, wanted = golden_inputs(bundle), golden_outputs(bundle)
    signature, info = bundle.info.signature, bundle.info
    n_samples = signature.n_samples(inputs)
    sizes = (*(n for n in SMALLER_BATCHES if n < n_samples), n_samples)
    found = []
    for n, outputs in outputs_by_batch(reference, inputs, sizes).items():
        fixed = {name: one for name, one in outputs.items() if name in wanted}
        largest, ok = _of_batch(session, signature.part(inputs, 0, n), fixed, wanted, info)
        found.append(BatchParity(batch=n, max_abs_difference=largest, ok=ok))
    return tuple(found)


def _of_batch(
    session: Session, feeds: Feeds, wanted: Feeds, whole: Feeds, info: BundleInfo
) -> tuple[float | None, bool]:
    """The largest difference, and whether all are in tolerance.

    The difference is None where the session cannot run the batch, or gives another shape or NaN.
    """
    try:
        found = session.run(feeds)
    except (ArtefactError, UsageError):
        return None, False
    compared = differences(found, wanted, atol=info.atol, rtol=info.rtol, rms=info.rms, spread_of=whole)
    largest = _largest(compared, "max_abs_difference")
    return (largest if math.isfinite(largest) else None), all(one.ok for one in compared)


def _largest(compared: tuple[OutputDifference, ...], field: str) -> float:
    known = [getattr(one, field) for one in compared if getattr(one, field) is not None]
    return float(np.max(known, initial=0.0))  # NaN where one is


def parity_of(found: Feeds, wanted: Feeds, bundle: Bundle) -> Parity:
    """How far outputs are from those that they should be, by the tolerances of the bundle.

    Raises:
        GateFailed: they have another shape.
    """
    for name, one in wanted.items():
        if name not in found or found[name].shape != one.shape:
            got = f"{name} {found[name].shape}" if name in found else f"no {name}"
            raise GateFailed(
                f"{bundle.path / MODEL_FILE} gives {got}.", expected=f"{one.shape} was expected."
            )
    agreement = None
    of_classes = bundle.info.task.name.startswith(CLASSIFICATION.name)
    if bundle.info.signature.n_classes is not None and of_classes:
        (name,) = bundle.info.signature.output_names
        if has_class_scores(found[name]):
            agreement = float((predicted_classes(found[name]) == predicted_classes(wanted[name])).mean())
    info = bundle.info
    compared = differences(found, wanted, atol=info.atol, rtol=info.rtol, rms=info.rms)
    return Parity(
        n_samples=_n_samples(wanted, bundle),
        max_abs_difference=_largest(compared, "max_abs_difference"),
        max_relative_difference=_largest(compared, "max_relative_difference"),
        top1_agreement=agreement,
        ok=all(one.ok for one in compared),
        outputs=compared,
    )


def _n_samples(outputs: Feeds, bundle: Bundle) -> int:
    signature = bundle.info.signature
    axes = ((one.name, one.axis(signature.batch)) for one in signature.outputs)
    return next((outputs[name].shape[axis] for name, axis in axes if axis is not None and name in outputs), 1)
