"""Logits of a whole data set, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sparse_export.errors import GateFailed
from sparse_export.runtimes import Session
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.tasks.data import Inputs

__all__ = ["Array", "onnx_logits", "session_logits", "torch_logits"]

BATCH = 500
BATCH_VALUES = 16 * 2**20  # of a batch's inputs: large pictures come in smaller batches

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def _batches(inputs: Inputs) -> Iterator[Array]:
    n_in_batch = max(1, min(BATCH, BATCH_VALUES // max(1, math.prod(inputs.shape[1:]))))
    for start in range(0, len(inputs), n_in_batch):
        yield inputs[start : start + n_in_batch]


def onnx_logits(file: Path, inputs: Inputs, *, n_threads: int | None = None) -> Array:
    """As `session_logits`, of an ONNX file by onnxruntime on the CPU."""
    with open_session(file, n_threads=n_threads) as session:
        return session_logits(session, inputs, who=f"The ONNX file {file}")


def session_logits(session: Session, inputs: Inputs, *, who: str = "") -> Array:
    """Run a session over a data set, in batches that it takes.

    Args:
        session: stays open.
        inputs: float32 (N, *input_shape).
        who: in the error, the runtime by default.

    Returns:
        Logits (N, classes).

    Raises:
        GateFailed: NaN or infinity among them.
        UsageError: inputs that do not fit.
    """
    found = []
    for batch in _batches(inputs):
        most = session.max_batch or len(batch)
        found += [session.run(batch[start : start + most]) for start in range(0, len(batch), most)]
    return _finite(np.concatenate(found), who or f"The runtime {session.name}")


def torch_logits(network: nn.Module, inputs: Inputs) -> Array:
    """As `session_logits`, of a torch network on the CPU."""
    with torch.inference_mode():
        logits = np.concatenate([network(torch.from_numpy(batch)).numpy() for batch in _batches(inputs)])
    return _finite(logits, "The PyTorch network")


def _finite(logits: Array, who: str) -> Array:
    bad = ~np.isfinite(logits.reshape(len(logits), -1)).all(axis=1)
    if bad.any():
        raise GateFailed(
            f"{who} gives NaN or infinity for {int(bad.sum())} of {len(logits)} samples, first number "
            f"{bad.argmax()}.",
            expected="Finite logits were expected.",
            do="Look at the weights: training may have diverged.",
        )
    return logits
