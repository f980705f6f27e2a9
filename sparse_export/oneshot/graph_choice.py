"""A choice of layers for a graph: what it is made on, and how its result does on the test set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from sparse_export.errors import UsageError
from sparse_export.files import temporary_folder
from sparse_export.formats.run import GRAPH_FILE
from sparse_export.formats.score import Score
from sparse_export.graph.model import save_model
from sparse_export.instruments.paired_scores import ScoreDifference
from sparse_export.oneshot.choosing import Progress
from sparse_export.oneshot.held_back import (
    HeldBack,
    held_from,
    most_held_of,
    of_own_data,
    part_of_test,
)
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.runtimes.outputs import statistics_of_session
from sparse_export.signature import Array, Feeds, Signature
from sparse_export.tasks.data import own
from sparse_export.tasks.inputs import InputFiles
from sparse_export.tasks.samples import BatchSamples, LabelledSamples
from sparse_export.tasks.scores import MaxDrop
from sparse_export.tasks.shipped import Classification
from sparse_export.tasks.task import Statistics, Task

__all__ = ["Bound", "Parts", "Tested", "held_back_of", "parts_of_inputs", "tested"]

SEARCHED = 512
"""Inputs without labels that layers are chosen on, at most."""

_SHARE = 5  # one in so many is for the report
_SEARCHED_SHARE = 0.3


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What was asked of a choice.

    Attributes:
        max_drop: what may be lost; None where nothing is chosen, and changes alone are measured.
        timings: file of `plan --keep-timings`; None for multiply-adds.
        task: of inputs without labels, what the dense network's answers are held to be right for; None for
            agreement of outputs.
        progress: told of each score.
    """

    max_drop: MaxDrop | None
    timings: Path | None = None
    task: Task | None = None
    progress: Progress | None = None


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Inputs without labels, divided.

    Attributes:
        calibration: that weights are calibrated on.
        search: that layers are chosen on.
        report: that the agreement in the report is measured on.
    """

    calibration: tuple[Feeds, ...]
    search: tuple[Feeds, ...]
    report: tuple[Feeds, ...]


def parts_of_inputs(found: InputFiles, signature: Signature, most_reported: int) -> Parts:
    """Divide inputs: three tenths to choose layers on, a fifth for the report, the others to calibrate on.

    Args:
        found: the inputs.
        signature: of the network.
        most_reported: samples for the report, at most.

    Raises:
        UsageError: there are too few.
    """
    calibration: list[Feeds] = []
    search: list[Feeds] = []
    report: list[Feeds] = []
    if signature.batch is None:
        parts = search, calibration, report, calibration, search, calibration, report, calibration, search
        for at, batch in enumerate(found.batches):
            parts[at % len(parts)].append(batch)
        search, report = search[:SEARCHED], report[:most_reported]
    else:
        n_reported = n_searched = 0
        for batch in found.batches:
            n = signature.n_samples(batch)
            shown = min(n // _SHARE, most_reported - n_reported)
            tried = min(int(_SEARCHED_SHARE * n), SEARCHED - n_searched)
            calibration.append(signature.part(batch, 0, n - shown - tried))
            if tried:
                search.append(signature.part(batch, n - shown - tried, n - shown))
            if shown:
                report.append(signature.part(batch, n - shown, n))
            n_reported, n_searched = n_reported + shown, n_searched + tried
    if not search or not calibration:
        raise UsageError(
            f"{found.n_samples} inputs are too few to choose layers by.",
            expected="At least 4 of one size were expected: three tenths are held back for that.",
            do="Give more inputs.",
        )
    return Parts(calibration=tuple(calibration), search=tuple(search), report=tuple(report))


def held_back_of(
    signature: Signature,
    test: LabelledSamples | None,
    data: str,
    n_calibration: int,
    search: Sequence[Feeds],
    bound: Bound,
    *,
    inputs: str,
    seed: int,
) -> tuple[HeldBack, Array | None]:
    """The samples that layers are chosen on.

    Args:
        signature: of the network.
        test: the test set; None without labels.
        data: its name.
        n_calibration: samples of a user's own data that weights are calibrated on.
        search: inputs without labels for it.
        bound: what was asked.
        inputs: name of their file.
        seed: of the choice.

    Returns:
        The samples, and the numbers of those of the test set among them; None where none are.

    Raises:
        UsageError: there are neither data nor inputs, or the network gives no classes.
    """
    if test is not None and test.task.scores_pairs:
        raise UsageError(
            f"Layers cannot be chosen by {test.task.name}: its samples come in pairs, and those that a choice "
            "is made on are drawn one by one.",
            do="Choose by --task embedding, or by --inputs FILE.npz without a task.",
        )
    if test is None:
        if not search:
            raise UsageError(
                "--max-drop needs a score, and there are no data to score on.",
                do="Give --task and --data, or real inputs by --inputs FILE.npz.",
            )
        if isinstance(bound.task, Classification) and signature.n_classes is None:
            raise UsageError(
                f"--task {bound.task.name} was given, and the network gives "
                f"{', '.join(map(str, signature.outputs))}.",
                expected="One output of (samples, classes) was expected.",
                do="Leave out --task: agreement of the outputs is then measured.",
            )
        samples = BatchSamples(parts=tuple(search), signature=signature)
        rows = range(len(samples))
        words = f"samples of {inputs} that were held back"
        return held_from(samples, None, bound.task, signature, rows, words=words, seed=seed), None
    if own.is_own(data) and len(own.own_data(data).parts) > 1:
        part, free = of_own_data(data, n_calibration)
        if free:
            most = most_held_of(own.PartSamples(part=part, signature=signature).n_values)
            free = [free[at * len(free) // min(most, len(free))] for at in range(min(most, len(free)))]
            some = own.Part(name=part.name, samples=[part.sample(row) for row in free])
            held = held_from(
                own.PartSamples(part=some, signature=signature),
                some.targets(),
                test.task,
                signature,
                range(len(some)),
                words=f"samples of {part.name}",
                seed=seed,
            )
            return held, None
    rows_held = part_of_test(len(test.samples), seed)
    held = held_from(
        test.samples,
        test.targets,
        test.task,
        signature,
        rows_held.tolist(),
        words=f"samples of {data}, a part of the test set",
        seed=seed,
    )
    return held, rows_held


@dataclass(frozen=True, kw_only=True)
class Tested:
    """The dense and the sparse network on the test set.

    Attributes:
        task: what both are for.
        of_dense: what the score is made of, (samples, k).
        of_sparse: likewise.
    """

    task: Task
    of_dense: Statistics
    of_sparse: Statistics

    @property
    def dense(self) -> Score:
        """Of all samples."""
        return self.task.score(self.of_dense)

    @property
    def sparse(self) -> Score:
        """Of all samples."""
        return self.task.score(self.of_sparse)

    def difference_but(self, held: Array | None) -> ScoreDifference | None:
        """Sparse minus dense on the samples that no layer was chosen on, with its interval.

        Args:
            held: numbers of the others; None for none.

        Returns:
            None where no samples are left.
        """
        rest = np.setdiff1d(np.arange(len(self.of_dense)), held if held is not None else [])
        return self.task.difference(self.of_dense[rest], self.of_sparse[rest]) if len(rest) else None


def tested(
    dense: onnx.ModelProto,
    sparse: onnx.ModelProto,
    signature: Signature,
    test: LabelledSamples,
    n_threads: int | None,
) -> Tested:
    """Run both networks over the test set, once.

    Args:
        dense: the graph as it came.
        sparse: the other.
        signature: of both.
        test: the test set.
        n_threads: of onnxruntime.
    """
    found = []
    with temporary_folder() as folder:
        for number, model in enumerate((dense, sparse)):
            path = folder / f"{number}" / GRAPH_FILE
            path.parent.mkdir()
            save_model(model, path)
            with open_session(path, signature=signature, n_threads=n_threads) as session:
                found.append(statistics_of_session(session, test))
    return Tested(task=test.task, of_dense=found[0], of_sparse=found[1])
