"""The golden pair: inputs, and the outputs that whatever runs a bundle has to give for them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sparse_export.artefact import GOLDEN_INPUT, GOLDEN_OUTPUT, RUN_FILE
from sparse_export.errors import GateFailed, UsageError
from sparse_export.files import write_bytes
from sparse_export.runtime.onnxruntime import open_session
from sparse_export.runtime.tolerance import outside_tolerance, spread

__all__ = [
    "ATOL",
    "GOLDEN_INPUT",
    "GOLDEN_OUTPUT",
    "GOLDEN_SAMPLES",
    "Array",
    "golden_input",
    "golden_pair",
    "require_parity",
    "write_golden",
]

GOLDEN_SAMPLES = 8
ATOL = 1e-6  # for logits that are all but equal; else the spread decides
_SEED = 20

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def golden_input(input_shape: Sequence[int]) -> Array:
    """Seeded standard normal inputs, (8, *input_shape)."""
    generator = np.random.default_rng(_SEED)
    return generator.standard_normal((GOLDEN_SAMPLES, *input_shape), dtype=np.float32)


def golden_pair(
    network: nn.Module, input_shape: Sequence[int], samples: Sequence[Array]
) -> tuple[Array, Array]:
    """Inputs (8, *input_shape), and what torch makes of them.

    Of a calibrated graph the first samples, since ranges say nothing of other inputs; else the golden input.
    """
    inputs = samples[0][:GOLDEN_SAMPLES] if samples else golden_input(input_shape)
    try:
        with torch.inference_mode():
            outputs = network(torch.from_numpy(inputs))
    except Exception as cause:
        raise UsageError(
            f"The network {type(network).__name__} does not take inputs {inputs.shape}: {str(cause) or type(cause).__name__}.",
            expected=f"Samples of shape {tuple(input_shape)} were expected to fit, as {RUN_FILE} says.",
        ) from cause
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != len(inputs):
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise UsageError(
            f"The network {type(network).__name__} returns {found} for inputs {inputs.shape}.",
            expected=f"Logits ({len(inputs)}, classes) were expected.",
            do="Wrap it in a module that returns the logits alone.",
        )
    golden = outputs.numpy()
    if not np.isfinite(golden).all():
        raise GateFailed(
            f"The network {type(network).__name__} gives NaN or infinity for {'calibration samples' if samples else 'standard normal inputs'}.",
            expected="Finite logits were expected.",
            do="Look at its weights: training may have diverged.",
        )
    return inputs, golden


def write_golden(folder: Path, inputs: Array, outputs: Array) -> None:
    """Write the pair into the folder of a bundle. Raises OutputError."""
    write_bytes(folder / GOLDEN_INPUT, _npy_bytes(inputs))
    write_bytes(folder / GOLDEN_OUTPUT, _npy_bytes(outputs))


def require_parity(file: Path, inputs: Array, outputs: Array, rtol: float) -> None:
    """Run a model file on the golden input. Raises GateFailed where it is not the network, within tolerance."""
    with open_session(file) as session:
        found = session.run(inputs)
    largest, outside = outside_tolerance(found, outputs, atol=ATOL, rtol=rtol)
    if outside:
        raise GateFailed(
            f"The exported graph differs from the network by {largest:.3g} on {len(inputs)} inputs.",
            expected=f"At most {ATOL:g} + {rtol:g} * {spread(outputs):.3g} was expected.",
            do="The export is wrong, or its precision too low for this network; nothing was written.",
        )


def _npy_bytes(array: Array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()
