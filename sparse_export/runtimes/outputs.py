"""Outputs of a network for a whole set of samples, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from sparse_export.errors import GateFailed
from sparse_export.runtimes import Session
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.signature import Array, Feeds, Signature, joined
from sparse_export.tasks.samples import LabelledSamples, SampleSet
from sparse_export.tasks.task import Statistics, Targets

__all__ = [
    "joint_batches",
    "output_batches",
    "outputs_of",
    "outputs_of_file",
    "scored_batches",
    "statistics_of_session",
]

BATCH = 500
BATCH_VALUES = 16 * 2**20  # of a batch's inputs: large pictures come in smaller batches


def output_batches(
    session: Session, samples: SampleSet, *, who: str = "", beside: Session | None = None
) -> Iterator[tuple[Feeds, dict[str, Array]]]:
    """Run a session over samples, in batches that it takes.

    Args:
        session: stays open.
        samples: that fit it.
        who: in the error, the runtime by default.
        beside: another session, whose batches are to be the same; None for none.

    Yields:
        The inputs and the outputs of each batch.

    Raises:
        GateFailed: NaN or infinity among the outputs.
        UsageError: inputs that do not fit.
    """
    start = 0
    for feeds in samples.batches(_most([session, *([] if beside is None else [beside])], samples)):
        yield feeds, _run(session, feeds, start, who)
        start += session.signature.n_samples(feeds)


def joint_batches(
    sessions: Mapping[str, Session], test: LabelledSamples
) -> Iterator[tuple[Feeds, Targets, dict[str, dict[str, Array]]]]:
    """Run several sessions over samples with targets, each of which is read once.

    Args:
        sessions: by what an error calls them; they stay open.
        test: that fit all of them.

    Yields:
        The inputs and targets of each batch, which all sessions take, and the outputs by session.

    Raises:
        GateFailed: as `output_batches`.
        UsageError: likewise.
    """
    start = 0
    signature = next(iter(sessions.values())).signature
    for feeds in test.samples.batches(_most(list(sessions.values()), test.samples)):
        end = start + signature.n_samples(feeds)
        outputs = {who: _run(session, feeds, start, who) for who, session in sessions.items()}
        yield feeds, test.targets[start:end], outputs
        start = end


def _most(sessions: Sequence[Session], samples: SampleSet) -> int:
    """The most samples of a batch that all sessions take."""
    bounds = [BATCH, max(1, BATCH_VALUES // max(1, samples.n_values))]
    return min(bounds + [one.max_batch for one in sessions if one.max_batch is not None])


def _run(session: Session, feeds: Feeds, start: int, who: str) -> dict[str, Array]:
    """The outputs of a batch whose first sample has that number. Raises GateFailed for NaN and infinity."""
    outputs = session.run(feeds)
    n = session.signature.n_samples(feeds)
    _require_finite(outputs, session.signature, start, n, who or f"The runtime {session.name}")
    return outputs


def scored_batches(
    session: Session, test: LabelledSamples, *, who: str = ""
) -> Iterator[tuple[Feeds, dict[str, Array], Statistics]]:
    """Run a session over samples with targets, in batches that it takes.

    Args:
        session: as of `output_batches`, as is who.
        test: that fit it.

    Yields:
        The inputs and the outputs of each batch, and what the score is made of, float64 (samples, k).

    Raises:
        GateFailed: NaN or infinity among the outputs.
        UsageError: outputs that the task cannot score.
    """
    start = 0
    for feeds, outputs in output_batches(session, test.samples, who=who):
        end = start + session.signature.n_samples(feeds)
        yield feeds, outputs, test.task.statistics(outputs, test.targets[start:end])
        start = end


def statistics_of_session(session: Session, test: LabelledSamples, *, who: str = "") -> Statistics:
    """What the score of a session is made of; arguments and errors as of `scored_batches`."""
    return np.concatenate([statistics for _, _, statistics in scored_batches(session, test, who=who)])


def outputs_of(session: Session, samples: SampleSet, *, who: str = "") -> dict[str, Array]:
    """Run a session over samples, and join what it gives.

    Args:
        session: as of `output_batches`, as are samples and who.

    Returns:
        Each output, of all samples.

    Raises:
        GateFailed: NaN or infinity among them.
        UsageError: inputs that do not fit.
    """
    signature = session.signature
    parts = [outputs for _, outputs in output_batches(session, samples, who=who)]
    return joined(parts, signature.outputs, signature.batch)


def outputs_of_file(
    file: Path, samples: SampleSet, *, signature: Signature | None = None, n_threads: int | None = None
) -> dict[str, Array]:
    """As `outputs_of`, of an ONNX file by onnxruntime on the CPU."""
    with open_session(file, signature=signature, n_threads=n_threads) as session:
        return outputs_of(session, samples, who=f"The ONNX file {file}")


def _require_finite(outputs: Feeds, signature: Signature, start: int, n: int, who: str) -> None:
    for one in signature.outputs:
        array = outputs[one.name]
        if array.dtype.kind not in "fV" or np.isfinite(array.astype(np.float32)).all():
            continue
        which = ""
        axis = one.axis(signature.batch)
        if axis is not None and array.shape[axis] == n:
            bad = ~np.isfinite(np.moveaxis(array.astype(np.float32), axis, 0).reshape(n, -1)).all(axis=1)
            which = f" for {int(bad.sum())} of {n} samples, first number {start + int(bad.argmax())}"
        raise GateFailed(
            f"{who} gives NaN or infinity in {one.name}{which}.",
            expected="Finite outputs were expected.",
            do="Look at the weights: training may have diverged.",
        )
