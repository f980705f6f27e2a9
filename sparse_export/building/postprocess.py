"""The golden values of what is appended behind a network, computed by NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sparse_export.building.golden import ATOL, Golden
from sparse_export.errors import GateFailed
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.runtimes.tolerance import differences, spread
from sparse_export.signature import Array, Signature

__all__ = ["golden_with_postprocess", "postprocessed"]

_RTOL = 1e-5  # of the same operator in float32


def postprocessed(scores: Array, signature: Signature, steps: Sequence[str]) -> dict[str, Array]:
    """Compute what a graph appends to its scores.

    Args:
        scores: of the network.
        signature: of the graph.
        steps: that are appended.

    Returns:
        The appended outputs, by name.
    """
    names, axis = iter(one.name for one in signature.appended), signature.outputs[0].class_axis
    values = scores.astype(np.float64)
    found: dict[str, Array] = {}
    if "softmax" in steps:
        powers = np.exp(values - values.max(axis=axis, keepdims=True))
        values = powers / powers.sum(axis=axis, keepdims=True)
    if "sigmoid" in steps:
        values = np.exp(-np.logaddexp(0.0, -values))
    if {"softmax", "sigmoid"} & set(steps):
        found[next(names)] = values.astype(np.float32)
    for step in steps:
        if step == "argmax":
            found[next(names)] = np.asarray(scores.argmax(axis=axis))
        elif step.startswith("topk"):
            assert axis is not None
            order = np.argsort(-scores.astype(np.float64), axis=axis, kind="stable")
            best = np.take(order, np.arange(int(step[5:])), axis=axis)
            found[next(names)] = np.take_along_axis(values, best, axis).astype(np.float32)
            found[next(names)] = best
    return found


def golden_with_postprocess(
    file: Path, signature: Signature, golden: Golden, steps: Sequence[str], rtol: float
) -> Golden:
    """Check what a model file appends to its own scores, and add it to the golden pair.

    Classes are added only where no rounding within the tolerance can change them.

    Args:
        file: an ONNX file that was checked against the golden pair.
        signature: of the graph.
        golden: the pair of the network.
        steps: that were appended.
        rtol: tolerance of the scores, as a share of their spread.

    Raises:
        GateFailed: an added output is not what NumPy computes.
    """
    names = tuple(one.name for one in signature.appended)
    with open_session(file, signature=signature, inner=names) as session:
        outputs = session.run(golden.inputs)
    scores, axis = outputs[signature.outputs[0].name], signature.outputs[0].class_axis
    wanted = postprocessed(scores, signature, steps)
    margin = 2 * (ATOL + rtol * spread(scores))
    n_apart = max((int(step[5:]) for step in steps if step.startswith("topk")), default=1)
    is_clear = axis is not None and _least_gap(scores, axis, n_apart) > margin
    kept = {}
    for one in signature.appended:
        is_float = one.dtype == "float32"
        (compared,) = differences(
            {one.name: outputs[one.name]}, {one.name: wanted[one.name]}, atol=ATOL, rtol=_RTOL
        )
        equal_values = is_float or _same_classes(outputs[one.name], wanted[one.name], scores, axis)
        if not (compared.ok if is_float else equal_values):
            raise GateFailed(
                f"The graph gives another {one.name} than NumPy computes from its scores.",
                do="Build without --postprocess, and report this; nothing was written.",
            )
        if is_float or is_clear:
            kept[one.name] = wanted[one.name]
    return replace(golden, outputs={**golden.outputs, **kept}, inner=(*golden.inner, *kept))


def _same_classes(found: Array, wanted: Array, scores: Array, axis: int | None) -> bool:
    """Are these classes equal, or of equal scores, among which any order is right?"""
    if axis is None or found.shape != wanted.shape:
        return False
    if found.ndim < scores.ndim:
        found, wanted = np.expand_dims(found, axis), np.expand_dims(wanted, axis)
    return np.array_equal(np.take_along_axis(scores, found, axis), np.take_along_axis(scores, wanted, axis))


def _least_gap(scores: Array, axis: int, n: int) -> float:
    """The least difference between scores of one sample that follow each other among its best n + 1."""
    ordered = -np.sort(-scores.astype(np.float64), axis=axis)
    gaps = -np.diff(np.take(ordered, np.arange(min(n + 1, scores.shape[axis])), axis=axis), axis=axis)
    return float(gaps.min(initial=np.inf))
