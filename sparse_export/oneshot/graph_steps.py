"""The steps of sparsify for a graph: the dense network is left as a run, the sparse one beside it."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sparse_export.errors import GateFailed, SparseExportError
from sparse_export.files import temporary_folder
from sparse_export.formats.run import GRAPH_FILE, DenseInfo, LayerInfo, Run, open_run
from sparse_export.formats.score import Score
from sparse_export.graph.finite import naming_weights
from sparse_export.graph.model import save_model
from sparse_export.oneshot.choosing import choose_layers
from sparse_export.oneshot.costs import Finished
from sparse_export.oneshot.graph_choice import Bound, tested
from sparse_export.oneshot.graph_inputs import Inputs, Scoring, held_back, split_inputs
from sparse_export.oneshot.graph_orders import OrderedGraph, ordered_graph
from sparse_export.oneshot.graph_pruning import CALIBRATION_MEMORY, PrunedGraph, sparsify_graph
from sparse_export.oneshot.graph_run import (
    dense_folder,
    dense_folder_taken,
    facts_of_graph,
    is_dense_run_of,
    write_graph_run,
)
from sparse_export.oneshot.graph_source import GraphSource
from sparse_export.oneshot.graph_state import remove_state, state_folder
from sparse_export.oneshot.layers import Method
from sparse_export.oneshot.recovering import kept_of, sparsify_recovering
from sparse_export.oneshot.recovery import Recovery
from sparse_export.oneshot.report import REPORT_FILE, SparsifyReport, Stage, method_name
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.runtimes.outputs import output_batches
from sparse_export.signature import Signature
from sparse_export.sparsity.pattern import NMPattern
from sparse_export.tasks.agreement import Agreement, agreement_of
from sparse_export.tasks.samples import BatchSamples
from sparse_export.tasks.task import Task
from sparse_export.train.run_folder import claimed_run, require_empty

__all__ = ["dense_run_of", "sparsify_source"]


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
        raise dense_folder_taken(out, "something else") from cause
    if not is_dense_run_of(run, source.sha256):
        raise dense_folder_taken(out, "another network")
    if not run.info.signature.agrees_with(source.signature):
        raise dense_folder_taken(out, f"this one with other inputs, {run.info.signature}")
    return run


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
    bound: Bound | None = None,
    recovery: Recovery | None = None,
    permute: bool = False,
    norms: bool = False,
    judge: Task | None = None,
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
        bound: of what may be lost, by which layers are chosen; None to make all sparse that should be.
        recovery: see `sparsify_recovering`.
        permute: look for an order of channels first that loses less.
        norms: re-estimate batch norms, see `sparsify_recovering`. Not with a bound.

    Returns:
        The run and the report.

    Raises:
        GateFailed: no layer can be sparse within the bound. Nothing is left then.
        SparseExportError: as `sparsify_graph` and `read_inputs`.
    """
    signature, split = split_inputs(source, inputs, calibration_samples, seed, scoring, bound)
    source = replace(source, signature=signature)
    held = None if bound is None else held_back(signature, split, scoring, bound, inputs, seed)
    with claimed_run(out), state_folder(out) as state:
        dense_run_there(source, dense_folder(out))  # what is in its place is told before the work
        began = time.monotonic()
        ordered = None
        if permute:
            ordered = ordered_graph(
                source.model,
                signature,
                calibration=split.calibration,
                held=split.held,
                pattern=pattern,
                method=method,
                keep_dense=keep_dense,
                planned_dense=planned_dense,
                memory_bytes=memory_bytes,
                seed=seed,
                n_threads=n_threads,
            )
        model = source.model if ordered is None else ordered.model

        options: dict[str, Any] = {
            "signature": signature,
            "batches": split.calibration or None,
            "pattern": pattern,
            "method": method,
            "keep_dense": keep_dense,
            "planned_dense": planned_dense,
            "memory_bytes": memory_bytes,
            "state": state,
            "observer": observer,
            "n_threads": n_threads,
            "errors": errors or recovery is not None,
        }
        first = pruned = sparsify_recovering(model, recovery=recovery, norms=norms, **options)
        choice = None

        def walk(only: Collection[str]) -> PrunedGraph:
            return sparsify_graph(model, only=only, recovery=kept_of(recovery, first), **options)

        if bound is not None and bound.max_drop is not None and held is not None:
            try:
                chosen = choose_layers(
                    model,
                    signature,
                    pruned,
                    held[0],
                    walk,
                    max_drop=bound.max_drop,
                    began=began,
                    timings=bound.timings,
                    n_threads=n_threads,
                    progress=bound.progress,
                )
            except GateFailed:
                remove_state(state)  # another call with this bound would end alike
                raise
            pruned, choice = chosen.pruned, chosen.choice
        seconds = time.monotonic() - began
        before = after = None
        if scoring is not None:
            done = tested(source.model, pruned.model, signature, scoring.test, n_threads)
            before, after = done.dense, done.sparse
            if choice is not None and held is not None:
                choice = replace(choice, test=done.difference_but(held[1]), test_is_share=after.is_share)
        dense = dense_run_of(source, dense_folder(out), scoring=scoring, test=before)
        agreement = _agreement(dense, pruned, signature, split, n_threads, judge)
        stages = (
            Stage(name="original", validation=None, test=before, seconds=0.0),
            Stage(name="sparsified", validation=None, test=after, seconds=seconds, agreement=agreement),
        )
        report = _report(source, pruned, pattern, method, seed, stages if scoring else stages[1:], ordered)
        report = replace(report, choice=choice, recovery=pruned.recovery, norms=pruned.settled)
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


def _agreement(
    dense: Run,
    pruned: PrunedGraph,
    signature: Signature,
    split: Inputs,
    n_threads: int | None,
    judge: Task | None,
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
            return agreement_of(pairs, signature, inputs=split.words, judge=judge)


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
    ordered: OrderedGraph | None = None,
) -> SparsifyReport:
    in_order = {} if ordered is None else ordered.in_order
    spaces = () if ordered is None else ordered.report.spaces
    notes = {} if ordered is None else {one.name: one.reason for one in ordered.report.layers}
    sparse = [layer for layer in pruned.layers if layer.pattern is not None]
    total = sum(layer.magnitude for layer in sparse)
    kept = sum(layer.magnitude * (layer.kept_share or 0.0) for layer in sparse)
    return SparsifyReport(
        model=source.name,
        weights=source.origin,
        pattern=str(pattern),
        method=method,
        permute=ordered is not None,
        moving=False,
        epochs=0,
        seed=seed,
        n_calibration=pruned.n_calibration,
        n_norms=len(pruned.norms) // 2,
        permuted_spaces=sum(space.permutation is not None for space in spaces),
        n_spaces=len(spaces),
        output_difference=0.0 if ordered is None else ordered.report.difference,
        untraced="",
        kept_share=kept / total if total else 1.0,
        layers=tuple(
            replace(
                one,
                kept_in_order=in_order.get(one.name),
                reason="; ".join(filter(None, [notes.get(one.name), one.reason])),
            )
            for one in pruned.layers
        ),
        stages=stages,
        n_resumed=pruned.n_resumed,
    )
