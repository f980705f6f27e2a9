"""The steps of sparsify for a graph: the dense network is left as a run, the sparse one beside it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import onnx

from sparse_export.errors import SparseExportError, UsageError
from sparse_export.files import is_leftover, temporary_folder
from sparse_export.formats.run import GRAPH_FILE, DataInfo, DenseInfo, LayerInfo, Run, open_run
from sparse_export.formats.score import Score
from sparse_export.graph.finite import naming_weights
from sparse_export.graph.model import save_model
from sparse_export.oneshot.costs import Finished
from sparse_export.oneshot.graph_pruning import CALIBRATION_MEMORY, PrunedGraph, sparsify_graph
from sparse_export.oneshot.graph_run import (
    dense_folder,
    facts_of_graph,
    is_dense_run_of,
    write_graph_run,
)
from sparse_export.oneshot.graph_source import GraphSource
from sparse_export.oneshot.layers import Method
from sparse_export.oneshot.report import REPORT_FILE, SparsifyReport, Stage, method_name
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.runtimes.outputs import output_batches, score_of
from sparse_export.signature import Feeds, Signature
from sparse_export.sparsity.pattern import NMPattern
from sparse_export.tasks.agreement import Agreement, agreement_of
from sparse_export.tasks.inputs import read_inputs, with_seen_ranges
from sparse_export.tasks.named_data import open_named
from sparse_export.tasks.samples import BatchSamples, LabelledSamples, labelled
from sparse_export.tasks.shipped import task_named
from sparse_export.train.run_folder import claimed_run, require_empty

__all__ = ["Scoring", "dense_run_of", "scoring_of", "sparsify_source"]

STATE_FOLDER = "resume-sparsify"
CALIBRATION_SAMPLES = 512
_HELD_BACK = 64  # samples at most that agreement is measured on
_HELD_SHARE = 5  # one in so many
_RANDOM_SAMPLES = 8
_SEED = 23


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What weights are calibrated on, and what the agreement is measured on.

    Attributes:
        calibration: batches; none for random inputs.
        held: batches for the agreement; none where nothing can be drawn.
        words: what these are.
    """

    calibration: tuple[Feeds, ...]
    held: tuple[Feeds, ...]
    words: str


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What a network is scored on.

    Attributes:
        info: record of the data.
        test: the samples.
        calibration: batches of the data to calibrate on; none where they have no such part.
    """

    info: DataInfo
    test: LabelledSamples
    calibration: tuple[Feeds, ...] = ()


def scoring_of(
    source: GraphSource, task: str | None, data: str | None, data_dir: Path | None
) -> Scoring | None:
    """The task and the data that a caller names for a graph.

    Args:
        source: the network.
        task: what it is for.
        data: what it is scored on, see `sparse_export.tasks.named_data.open_named`.
        data_dir: where a relative file starts.

    Returns:
        None where neither is named.

    Raises:
        UsageError: one of them is missing, or they do not fit the network.
        DataNotFound: the data are not there.
        ArtefactError: they cannot be read.
    """
    if task is None and data is None:
        return None
    if task is None or data is None:
        raise UsageError(
            f"--{'data' if task is None else 'task'} was given for {source.name} without "
            f"--{'task' if task is None else 'data'}.",
            expected="Both were expected: what the network is for, and samples with targets.",
        )
    known = task_named(task)
    found = open_named(data, source.signature, data_dir)
    test = labelled(
        found.samples,
        found.targets,
        known,
        source.signature,
        of=data,
        network=f"The network {source.name}",
        do="Name another task.",
    )
    return Scoring(
        info=found.info(),
        test=test,
        calibration=() if found.calibration is None else tuple(found.calibration(CALIBRATION_SAMPLES)),
    )


def dense_run_there(source: GraphSource, out: Path) -> Run | None:
    """Look for the dense network as a run, before any work.

    Args:
        source: the network.
        out: folder of the run.

    Returns:
        The run, its files checked by hash; None where the folder is free.

    Raises:
        UsageError: the folder holds something else, or the network with other inputs.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        run = open_run(out)
    except SparseExportError as cause:  # whatever is there, it is no such run
        raise _elsewhere(out, "something else") from cause
    if not is_dense_run_of(run, source.sha256):
        raise _elsewhere(out, "another network")
    if not run.info.signature.agrees_with(source.signature):
        raise _elsewhere(out, f"this one with other inputs, {run.info.signature}")
    return run


def _elsewhere(out: Path, what: str) -> UsageError:
    return UsageError(
        f"{out} is where the dense network is left, and it holds {what}.",
        do="Move that away, or choose another --out.",
    )


def dense_run_of(
    source: GraphSource, out: Path, *, scoring: Scoring | None = None, test: Score | None = None
) -> Run:
    """Leave the dense network as a run, unless it is there already.

    Args:
        source: the network.
        out: folder of the run.
        scoring: what it was scored on, if anything.
        test: its score.

    Raises:
        UsageError: as `dense_run_there`.
        OutputError: it cannot be written.
    """
    there = dense_run_there(source, out)
    if there is not None:
        return there
    with claimed_run(out):
        require_empty(out)
        return write_graph_run(
            out,
            source.model,
            source.signature,
            facts_of_graph(source.model),
            name=source.name,
            dense=DenseInfo(sha256=source.sha256, path=None, test=test),
            test=test,
            task=None if scoring is None else scoring.test.task.name,
            data=None if scoring is None else scoring.info,
        )


def sparsify_source(
    source: GraphSource,
    out: Path,
    *,
    pattern: NMPattern,
    method: Method,
    inputs: Path | None,
    calibration_samples: int,
    keep_dense: Sequence[str] = (),
    planned_dense: Mapping[str, str] | None = None,
    memory_bytes: int = CALIBRATION_MEMORY,
    seed: int = 0,
    n_threads: int | None = None,
    observer: Finished | None = None,
    scoring: Scoring | None = None,
    errors: bool = False,
) -> tuple[Run, SparsifyReport]:
    """Make a graph N:M sparse, and write it as a finished run with the dense one beside it.

    Args:
        source: the network.
        out: folder of the run; the dense one is left in that folder's name with `-dense` behind it.
        pattern: N:M.
        method: how weights are chosen.
        inputs: file or folder of real inputs; None for `magnitude` without any.
        calibration_samples: of them that weights are calibrated on, at most.
        keep_dense: shell patterns of weights, or of nodes, that stay as they are.
        planned_dense: weights that a plan leaves dense, with its reasons.
        memory_bytes: bound of the values that a walk keeps in memory.
        seed: of the choice of samples.
        n_threads: of onnxruntime.
        observer: told of each layer.
        scoring: what the dense and the sparse network are scored on; None for their agreement alone. Without
            inputs its calibration samples are used.
        errors: measure the error of each layer by `magnitude` too.

    Returns:
        The run and the report.

    Raises:
        SparseExportError: as `sparsify_graph` and `read_inputs`.
    """
    signature, split = _split_inputs(source, inputs, calibration_samples, seed, scoring)
    source = replace(source, signature=signature)
    with claimed_run(out):
        state = out / STATE_FOLDER
        _require_own(out)
        dense_run_there(source, dense_folder(out))  # what is in its place is told before the work
        began = time.monotonic()
        try:
            pruned = sparsify_graph(
                source.model,
                signature=signature,
                batches=split.calibration or None,
                pattern=pattern,
                method=method,
                keep_dense=keep_dense,
                planned_dense=planned_dense,
                memory_bytes=memory_bytes,
                state=state,
                observer=observer,
                n_threads=n_threads,
                errors=errors,
            )
        except BaseException:
            for folder in (state, out):  # but not what a layer was left in
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
        seconds = time.monotonic() - began
        before, after = _scores(source.model, pruned.model, signature, scoring, n_threads)
        dense = dense_run_of(source, dense_folder(out), scoring=scoring, test=before)
        agreement = _agreement(dense, pruned, signature, split, n_threads)
        stages = (
            Stage(name="original", validation=None, test=before, seconds=0.0),
            Stage(name="sparsified", validation=None, test=after, seconds=seconds, agreement=agreement),
        )
        report = _report(source, pruned, pattern, method, seed, stages if scoring else stages[1:])
        run = write_graph_run(
            out,
            pruned.model,
            signature,
            _facts(pruned),
            name=source.name,
            method=method_name(report),
            seed=seed,
            seconds=seconds,
            dense=DenseInfo(sha256=source.sha256, path=str(dense.path), test=before),
            test=after,
            task=None if scoring is None else scoring.test.task.name,
            data=None if scoring is None else scoring.info,
            report=asdict(report),
            report_file=REPORT_FILE,
        )
    return run, report


def _require_own(out: Path) -> None:
    """Raise UsageError where the folder holds more than what a killed sparsify left."""
    own = out / STATE_FOLDER
    others = (
        [one for one in out.iterdir() if one != own and not is_leftover(one.name)] if out.is_dir() else []
    )
    if others or not own.is_dir():
        require_empty(out)


def _split_inputs(
    source: GraphSource,
    inputs: Path | None,
    calibration_samples: int,
    seed: int,
    scoring: Scoring | None,
) -> tuple[Signature, _Inputs]:
    """One sample in five, 64 at most, is held back for the agreement."""
    signature = source.signature
    if inputs is None and scoring is not None and scoring.calibration:
        return signature, _Inputs(calibration=scoring.calibration, held=(), words="")
    if inputs is None:
        held = (signature.draw(_RANDOM_SAMPLES, _SEED),) if signature.drawable else ()
        return signature, _Inputs(calibration=(), held=held, words=f"{_RANDOM_SAMPLES} random samples")
    found = read_inputs(inputs, signature, n_samples=calibration_samples + _HELD_BACK, seed=seed)
    signature = with_seen_ranges(signature, found)
    calibration: list[Feeds] = []
    held_parts: list[Feeds] = []
    n_held = n_parts = 0
    for batch in found.batches:
        n = signature.n_samples(batch)
        n_parts += 1
        if signature.batch is None:
            aside = n_parts % _HELD_SHARE == 0 and n_held < _HELD_BACK
            (held_parts if aside else calibration).append(batch)
            n_held += aside
            continue
        back = min(n // _HELD_SHARE, _HELD_BACK - n_held)
        calibration.append(signature.part(batch, 0, n - back))
        if back:
            held_parts.append(signature.part(batch, n - back, n))
            n_held += back
    if not n_held:
        words = f"the {found.n_samples} samples of {inputs.name} that it was calibrated on"
        return signature, _Inputs(calibration=tuple(calibration), held=tuple(calibration), words=words)
    words = f"{n_held} samples of {inputs.name} that were held back"
    return signature, _Inputs(calibration=tuple(calibration), held=tuple(held_parts), words=words)


def _scores(
    dense: onnx.ModelProto,
    sparse: onnx.ModelProto,
    signature: Signature,
    scoring: Scoring | None,
    n_threads: int | None,
) -> tuple[Score | None, Score | None]:
    """Of the dense and the sparse graph on the same samples."""
    if scoring is None:
        return None, None
    found = []
    with temporary_folder() as folder:
        for number, model in enumerate((dense, sparse)):
            path = folder / f"{number}" / GRAPH_FILE
            path.parent.mkdir()
            save_model(model, path)
            with open_session(path, signature=signature, n_threads=n_threads) as session:
                found.append(score_of(session, scoring.test))
    return found[0], found[1]


def _agreement(
    dense: Run, pruned: PrunedGraph, signature: Signature, split: _Inputs, n_threads: int | None
) -> Agreement | None:
    if not split.held:
        return None
    samples = BatchSamples(parts=split.held, signature=signature)
    with temporary_folder() as folder:
        save_model(pruned.model, folder / GRAPH_FILE)
        with (
            naming_weights(pruned.model),
            open_session(dense.graph_path, signature=signature, n_threads=n_threads) as before,
            open_session(folder / GRAPH_FILE, signature=signature, n_threads=n_threads) as after,
        ):
            first = output_batches(before, samples, who="The dense network")
            second = output_batches(after, samples, who="The sparse network")
            pairs = ((a, b) for (_, a), (_, b) in zip(first, second, strict=True))
            return agreement_of(pairs, signature, inputs=split.words)


def _facts(pruned: PrunedGraph) -> list[LayerInfo]:
    """The record of each stored weight; what is not looked into may be stored under no name."""
    return [
        LayerInfo(
            name=layer.name,
            shape=layer.shape,
            n_weights=layer.n_weights,
            n_active=layer.n_active,
            masked=layer.pattern is not None,
            pattern=layer.pattern,
            why_dense=layer.reason if layer.pattern is None else None,
        )
        for layer in pruned.layers
        if layer.n_weights
    ]


def _report(
    source: GraphSource,
    pruned: PrunedGraph,
    pattern: NMPattern,
    method: Method,
    seed: int,
    stages: tuple[Stage, ...],
) -> SparsifyReport:
    sparse = [layer for layer in pruned.layers if layer.pattern is not None]
    total = sum(layer.magnitude for layer in sparse)
    kept = sum(layer.magnitude * (layer.kept_share or 0.0) for layer in sparse)
    return SparsifyReport(
        model=source.name,
        weights=source.origin,
        pattern=str(pattern),
        method=method,
        permute=False,
        moving=False,
        epochs=0,
        seed=seed,
        n_calibration=pruned.n_calibration,
        n_norms=0,
        permuted_spaces=0,
        n_spaces=0,
        output_difference=0.0,
        untraced="",
        kept_share=kept / total if total else 1.0,
        layers=pruned.layers,
        stages=stages,
        n_resumed=pruned.n_resumed,
    )
