"""How far a sparse network agrees with the dense one: the score where there are no labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparse_export.errors import UsageError
from sparse_export.instruments.statistics import mean_interval
from sparse_export.signature import FLOATS, Array, Feeds, Signature, TensorInfo
from sparse_export.tasks.shipped import is_own, task_named
from sparse_export.tasks.task import Statistics, Task

__all__ = [
    "Agreement",
    "OutputAgreement",
    "agreement_of",
    "agreement_text",
    "as_targets",
    "judge_named",
    "lost_channels_text",
    "output_text",
    "require_judge",
]

_MOST_CHANNELS = 2**16
_NOTED_SHARE = 0.1  # of an output's channels; a few that hardly vary say little


@dataclass(frozen=True, kw_only=True)
class OutputAgreement:
    """One output of two networks on the same samples.

    Attributes:
        name: of the output.
        relative_distance: of floats, ‖sparse - dense‖ / ‖dense‖ over all samples; None of others.
        cosine: of floats, the mean over the samples of the cosine between both; None of others, and where a
            sample has one value, whose cosine would be its sign.
        equal_share: of integers and truth values, the share that is equal; None of floats.
        n_channels: of floats, how many channels vary, by the shortest axis of fixed length, as the classes of
            logits or the rows of a detector's boxes and scores; None where there is no such axis.
        n_channels_lost: how many of them keep less than half of their variance: their squared distance from
            the dense network's is more than half of it. The cosine does not see this in channels whose
            values are small beside those of others.
    """

    name: str
    relative_distance: float | None
    cosine: float | None
    equal_share: float | None
    n_channels: int | None = None
    n_channels_lost: int | None = None


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far a network agrees with the dense one.

    Attributes:
        inputs: what they were run on, in words.
        n_samples: how many there were.
        percent: 100 times the mean over the samples of the mean over the outputs of the cosine; of integers
            of the share that is equal; of floats with one value a sample of 1 - |sparse - dense| / s, 0 at
            least, where s is the root of the dense network's mean square. That agrees with itself by 100.
        low: end of its 95 % interval; that of the percent for one sample.
        high: likewise.
        outputs: one entry for each output.
        left_out: outputs that were not compared, and why.
        task: that judged it, whose score, with the dense network's outputs as targets, is the percent; None
            where nobody did.
        score_name: of that task.
    """

    inputs: str
    n_samples: int
    percent: float
    low: float
    high: float
    outputs: tuple[OutputAgreement, ...]
    left_out: dict[str, str]
    task: str | None = None
    score_name: str | None = None


@dataclass(kw_only=True)
class _Channels:
    """Of each channel of an output the sums over everything else, float64 (C,). axis: of the channels."""

    axis: int
    n_values: int = 0
    total: Array | float = 0.0
    squares: Array | float = 0.0
    distance: Array | float = 0.0

    def add(self, dense: Array, sparse: Array) -> None:
        a = np.moveaxis(dense, self.axis, 0).reshape(dense.shape[self.axis], -1).astype(np.float64)
        b = np.moveaxis(sparse, self.axis, 0).reshape(len(a), -1)
        self.n_values += a.shape[1]
        self.total = self.total + a.sum(1)
        self.squares = self.squares + np.square(a).sum(1)
        self.distance = self.distance + np.square(b - a).sum(1)

    def counts(self) -> tuple[int, int]:
        """Channels that vary, and those of them that keep less than half of their variance."""
        spread = np.asarray(self.squares - np.square(self.total) / max(self.n_values, 1))
        varies = spread > 1e-9 * np.asarray(self.squares)  # above what rounding leaves of a constant
        lost = varies & (2 * np.asarray(self.distance) > spread)
        return int(varies.sum()), int(lost.sum())


@dataclass(kw_only=True)
class _Sums:
    """Of one output so far.

    shares: by sample, its cosine or the share that is equal; of a batch with one value a sample, how far the
    networks are apart.
    """

    is_float: bool
    shares: list[Array]
    distance: float = 0.0
    size: float = 0.0
    n_values: int = 0
    one_valued: list[bool]
    channels: _Channels | None = None

    def by_sample(self) -> Array:
        """From -1 to 1 for each sample."""
        scale = math.sqrt(self.size / max(self.n_values, 1))
        parts = [
            _closeness(share, scale) if one else share
            for share, one in zip(self.shares, self.one_valued, strict=True)
        ]
        return np.concatenate(parts)


def require_judge(task: Task) -> Task:
    """Check that a task can say how far two networks agree.

    Args:
        task: of a user's own.

    Raises:
        UsageError: its score is no share of which more is better, or is of pairs of samples.
    """
    if not (task.is_share and task.higher_is_better) or task.scores_pairs:
        raise UsageError(
            f"The score of {task.name} does not say how far two networks agree.",
            expected="Without targets a share of single samples, more of it being better, was expected.",
            do="Give targets by --data, or leave --task out: the agreement of the outputs is then measured.",
        )
    return task


def judge_named(task: str | None) -> Task | None:
    """A task of a user's own, to hold a network without labels against the dense one by.

    Args:
        task: that was named.

    Returns:
        None for a shipped one, and for none.

    Raises:
        UsageError: its score does not say how far two networks agree.
    """
    return require_judge(task_named(task)) if task is not None and is_own(task) else None


def as_targets(outputs: Feeds, signature: Signature) -> list[Any]:
    """What a network gave for a batch, as targets of its samples for a task of a user's own.

    Args:
        outputs: by name.
        signature: of the network.

    Returns:
        For each sample its output; of several outputs a mapping by name.
    """
    rows = {}
    for one in signature.outputs:
        if one.name in outputs:
            axis, array = one.axis(signature.batch), outputs[one.name]
            rows[one.name] = array[None] if axis is None else np.moveaxis(array, axis, 0)
    if len(rows) == 1:
        return list(next(iter(rows.values())))
    n = max(map(len, rows.values()))
    return [{name: some[at] for name, some in rows.items() if at < len(some)} for at in range(n)]


def agreement_of(
    pairs: Iterable[tuple[Feeds, Feeds]], signature: Signature, *, inputs: str, judge: Task | None = None
) -> Agreement:
    """Hold the outputs of a sparse network against those of the dense one.

    Args:
        pairs: of each batch what the dense and the sparse network gave, by name.
        signature: of both.
        inputs: what they were run on, in words.
        judge: a task whose score, with the dense network's outputs as targets, is the agreement: 100 % less
            by how much the sparse network has a lower one than the dense network. See `require_judge`.

    Raises:
        UsageError: no output can be compared, or the task cannot score them.
    """
    sums: dict[str, _Sums] = {}
    left_out: dict[str, str] = {}
    judged: tuple[list[Statistics], list[Statistics]] = ([], [])
    for dense, sparse in pairs:
        if judge is not None:
            targets = as_targets(dense, signature)
            for statistics, given in zip(judged, (dense, sparse), strict=True):
                statistics.append(judge.statistics(given, targets))
        for one in signature.outputs:
            name = one.name
            if name not in dense or name not in sparse or name in left_out:
                continue
            if dense[name].shape != sparse[name].shape:
                left_out[name] = "its size depends on what the network finds"
                sums.pop(name, None)
                continue
            known = sums.setdefault(name, _new_sums(one, signature.batch))
            axis = one.axis(signature.batch)
            _add(known, _rows(dense[name], axis), _rows(sparse[name], axis))
            if known.channels is not None:
                known.channels.add(dense[name], sparse[name])
    by_output = {name: one.by_sample() for name, one in sums.items()}
    by_output = {name: shares for name, shares in by_output.items() if len(shares)}
    if not by_output:
        raise UsageError(
            f"No output of the network can be compared: {_reasons(left_out) or 'there are no samples'}.",
            do="Give networks with an output of fixed size, as scores before a selection of boxes.",
        )
    compared = tuple(_of_output(name, sums[name], by_output[name]) for name in by_output)
    if judge is not None:
        apart = judge.difference(*(np.concatenate(statistics) for statistics in judged))
        return Agreement(
            inputs=inputs,
            n_samples=apart.n_samples,
            percent=100 + apart.amount,
            low=100 + apart.low,
            high=min(100.0, 100 + apart.high),
            outputs=compared,
            left_out=left_out,
            task=judge.name,
            score_name=judge.score_name,
        )
    n_samples = max(map(len, by_output.values()))
    values = np.mean([np.resize(shares, n_samples) for shares in by_output.values()], axis=0)
    found = mean_interval(list(map(float, values)))
    half = found.half_width or 0.0
    return Agreement(
        inputs=inputs,
        n_samples=n_samples,
        percent=100 * found.mean,
        low=100 * (found.mean - half),
        high=min(100.0, 100 * (found.mean + half)),
        outputs=compared,
        left_out=left_out,
    )


def _new_sums(one: TensorInfo, batch: str | None) -> _Sums:
    fixed = {
        size: axis
        for axis, size in reversed(list(enumerate(one.shape)))
        if isinstance(size, int) and 1 < size <= _MOST_CHANNELS and axis != one.axis(batch)
    }
    is_float = one.dtype in FLOATS
    channels = _Channels(axis=fixed[min(fixed)]) if fixed and is_float else None
    return _Sums(is_float=is_float, shares=[], one_valued=[], channels=channels)


def _rows(array: Array, axis: int | None) -> Array:
    """An output as (samples, values); one sample where none are counted."""
    if axis is None:
        return array.reshape(1, -1)
    return np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)


def _add(known: _Sums, dense: Array, sparse: Array) -> None:
    known.one_valued.append(known.is_float and dense.shape[1] == 1)
    if not known.is_float:
        equal = dense == sparse
        known.shares.append(equal.mean(1) if equal.shape[1] else np.ones(len(equal)))
        return
    a, b = dense.astype(np.float64), sparse.astype(np.float64)
    known.distance += float(np.square(b - a).sum())
    known.size += float(np.square(a).sum())
    known.n_values += a.size
    if known.one_valued[-1]:
        known.shares.append(np.abs(b - a)[:, 0])
        return
    norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    product = norms[0] * norms[1]
    cosine = np.divide((a * b).sum(1), product, out=np.zeros(len(a)), where=product > 0)
    cosine[(norms[0] == 0) & (norms[1] == 0)] = 1.0
    known.shares.append(np.clip(cosine, -1.0, 1.0))


def _closeness(apart: Array, scale: float) -> Array:
    found: Array = np.clip(1 - apart / scale, 0.0, 1.0) if scale else (apart == 0).astype(np.float64)
    return found


def _of_output(name: str, known: _Sums, shares: Array) -> OutputAgreement:
    mean = float(shares.mean())
    if not known.is_float:
        return OutputAgreement(name=name, relative_distance=None, cosine=None, equal_share=mean)
    distance = math.sqrt(known.distance / known.size) if known.size else math.sqrt(known.distance)
    cosine = None if all(known.one_valued) else mean
    n_channels, n_lost = (None, None) if known.channels is None else known.channels.counts()
    return OutputAgreement(
        name=name,
        relative_distance=distance,
        cosine=cosine,
        equal_share=None,
        n_channels=n_channels,
        n_channels_lost=n_lost,
    )


def _reasons(left_out: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in left_out.items())


def agreement_text(agreement: Agreement) -> str:
    """Like `99.31 % [99.20, 99.42], 95 % interval, on 64 samples of inputs.npz`."""
    by = "" if agreement.score_name is None else f" by {agreement.score_name}"
    if agreement.n_samples == 1:  # which has no interval
        return f"{agreement.percent:.2f} %{by} on {agreement.inputs}"
    return (
        f"{agreement.percent:.2f} %{by} [{agreement.low:.2f}, {agreement.high:.2f}], "
        f"95 % interval, on {agreement.inputs}"
    )


def output_text(one: OutputAgreement) -> str:
    """Like `relative distance 0.0123, cosine 0.9998`."""
    if one.equal_share is not None:
        return f"{100 * one.equal_share:.2f} % equal"
    text = f"relative distance {one.relative_distance:.4g}"
    if one.cosine is not None:
        text += f", cosine {one.cosine:.5f}"
    return text


def lost_channels_text(agreement: Agreement | None) -> str:
    """A sentence where many channels of an output are lost, which the agreement may hide; else empty.

    Args:
        agreement: of the outputs; None where it was not measured.
    """
    for one in () if agreement is None or agreement.task is not None else agreement.outputs:
        n, n_lost = one.n_channels, one.n_channels_lost
        if n and n_lost and n_lost >= _NOTED_SHARE * n:
            return (
                f"Beware: {n_lost} of {n} channels of {one.name} keep less than half of their variance. "
                "Agreement hardly sees channels of small values, as scores beside coordinates: measure what "
                "counts by a task of your own, with --task."
            )
    return ""
