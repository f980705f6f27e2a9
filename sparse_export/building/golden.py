"""The golden pair: inputs, and the outputs that every runtime of a bundle has to give for them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sparse_export.errors import ArtefactError, GateFailed, UsageError
from sparse_export.files import write_bytes
from sparse_export.formats.bundle import GOLDEN_INPUT, GOLDEN_OUTPUT
from sparse_export.formats.run import RUN_FILE
from sparse_export.graph.randomness import require_deterministic
from sparse_export.runtimes import Session
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.runtimes.tolerance import outside_tolerance, spread

__all__ = [
    "ATOL",
    "GOLDEN_INPUT",
    "GOLDEN_OUTPUT",
    "GOLDEN_SAMPLES",
    "SMALLER_BATCHES",
    "Array",
    "Golden",
    "batch_sizes",
    "golden_input",
    "golden_pair",
    "largest_difference",
    "outputs_by_batch",
    "require_parity",
    "write_golden",
]

GOLDEN_SAMPLES = 8
ATOL = 1e-6  # for logits that are all but equal; else the spread decides
SMALLER_BATCHES = (1, 2, 3)  # a branch on 1, on more than 1, or on an even size shows in one of them
_SEED = 20

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


@dataclass(frozen=True, kw_only=True)
class Golden:
    """Inputs, and torch's outputs for them.

    Attributes:
        inputs: (8, *input_shape).
        outputs: logits, (8, n_classes).
        smaller: by n, torch's outputs for a batch of the first n inputs alone.
    """

    inputs: Array
    outputs: Array
    smaller: Mapping[int, Array]


def golden_input(input_shape: Sequence[int]) -> Array:
    """Seeded standard normal inputs, (8, *input_shape)."""
    generator = np.random.default_rng(_SEED)
    return generator.standard_normal((GOLDEN_SAMPLES, *input_shape), dtype=np.float32)


def golden_pair(network: nn.Module, input_shape: Sequence[int], samples: Sequence[Array]) -> Golden:
    """Run a network on the golden input, at once and in smaller batches.

    Args:
        network: maps (n, *input_shape) to logits.
        input_shape: of one sample.
        samples: calibration batches. Where there are some, the first samples are the inputs, since ranges say
            nothing about other inputs.

    Raises:
        UsageError: the network does not take these inputs, returns no logits, or is random in evaluation.
        GateFailed: an output is NaN or infinite.
    """
    inputs = samples[0][:GOLDEN_SAMPLES] if samples else golden_input(input_shape)
    outputs = _logits(network, inputs, f"{RUN_FILE} says that samples have shape {tuple(input_shape)}.")
    require_deterministic(network, input_shape)
    if not np.isfinite(outputs).all():
        raise GateFailed(
            f"The network {type(network).__name__} gives NaN or infinity for "
            f"{'calibration samples' if samples else 'standard normal inputs'}.",
            do="Look at its weights: training may have diverged.",
        )
    return Golden(inputs=inputs, outputs=outputs, smaller=outputs_by_batch(network, inputs))


def outputs_by_batch(
    network: nn.Module, inputs: Array, sizes: Sequence[int] = SMALLER_BATCHES
) -> dict[int, Array]:
    """Run a network on the first n inputs, for each batch size n.

    Args:
        network: maps (n, *input_shape) to logits.
        inputs: (N, *input_shape), N no less than the largest size.
        sizes: batch sizes.

    Returns:
        The logits of each batch, by its size.

    Raises:
        UsageError: the network does not take n samples.
    """
    expected = "Every batch size has to fit: that of the graph is free."
    return {n: _logits(network, inputs[:n], expected) for n in sizes}


def _logits(network: nn.Module, inputs: Array, expected: str) -> Array:
    """Run a batch. Raises UsageError where there are no logits, with what was expected of the inputs."""
    try:
        with torch.inference_mode():
            outputs = network(torch.from_numpy(inputs))
    except Exception as cause:
        raise UsageError(
            f"The network {type(network).__name__} does not take inputs {inputs.shape}: "
            f"{str(cause) or type(cause).__name__}.",
            expected=expected,
        ) from cause
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != len(inputs):
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise UsageError(
            f"The network {type(network).__name__} returns {found} for inputs {inputs.shape}, "
            f"not logits ({len(inputs)}, classes).",
            do="Wrap it in a module that returns the logits alone.",
        )
    logits: Array = outputs.numpy()
    return logits


def write_golden(folder: Path, golden: Golden) -> None:
    """Write the pair into the folder of a bundle.

    Raises:
        OutputError: it cannot be written.
    """
    write_bytes(folder / GOLDEN_INPUT, _npy_bytes(golden.inputs))
    write_bytes(folder / GOLDEN_OUTPUT, _npy_bytes(golden.outputs))


def require_parity(file: Path, golden: Golden, rtol: float) -> None:
    """Run a model file on the golden input, whole and in smaller batches.

    Args:
        file: an ONNX file.
        golden: the pair.
        rtol: largest difference, as a share of the spread of all golden logits; `ATOL` is added.

    Raises:
        GateFailed: an output of the file differs by more.
    """
    wanted = golden.outputs
    allowed = ATOL + rtol * spread(wanted)
    with open_session(file) as session:
        found = session.run(golden.inputs)
        differences = {
            n: largest_difference(session, golden.inputs[:n], one) for n, one in golden.smaller.items()
        }
    # The same samples, as part of the whole batch: what is wrong there as well is no matter of the batch
    # size.
    in_whole = {n: outside_tolerance(found[:n], wanted[:n], atol=0.0, rtol=0.0)[0] for n in differences}
    whole = differences[len(wanted)] = outside_tolerance(found, wanted, atol=0.0, rtol=0.0)[0]
    wrong = [n for n, one in differences.items() if one is None or not one <= allowed]
    if not wrong:
        return
    if all((n in wrong) == (not one <= allowed) for n, one in in_whole.items()):
        raise GateFailed(
            f"The exported graph differs from the network by {whole:.3g} on {len(wanted)} inputs.",
            expected=f"At most {ATOL:g} + {rtol:g} * {spread(wanted):.3g} is allowed.",
            do="The export is wrong, or its precision too low for this network; nothing was written.",
        )
    raise GateFailed(
        f"The exported graph differs from the network at batch {batch_sizes(wrong)} and agrees at batch "
        f"{batch_sizes([n for n in differences if n not in wrong])}.",
        expected=f"At most {ATOL:g} + {rtol:g} ** {spread(wanted):.3g} is allowed.",
        do="Remove from forward what depends on the batch size, such as a branch on x.shape[0]. "
        "Nothing was written.",
    )


def largest_difference(session: Session, inputs: Array, wanted: Array) -> float | None:
    """Run a batch and compare the outputs.

    Args:
        session: an opened model.
        inputs: (n, *input_shape).
        wanted: logits, (n, n_classes).

    Returns:
        The largest absolute difference; None where the session cannot run the batch.
    """
    try:
        found = session.run(inputs)
    except (ArtefactError, UsageError):
        return None
    return outside_tolerance(found, wanted, atol=0.0, rtol=0.0)[0]


def batch_sizes(sizes: Sequence[int]) -> str:
    """Format batch sizes in words: `1`, `1 and 2`, `1, 2 and 3`."""
    *first, last = map(str, sizes)
    return f"{', '.join(first)} and {last}" if first else last


def _npy_bytes(array: Array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()
