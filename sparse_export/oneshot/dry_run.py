"""What each layer of a network changes if it alone is sparse; nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparse_export.oneshot.arguments import (
    data_name,
    require_numbers,
)
from sparse_export.oneshot.bound import bound_of, require_scored, with_answers_of_dense
from sparse_export.oneshot.choice import Sensitivities
from sparse_export.oneshot.costs import Finished
from sparse_export.oneshot.graph_dry_run import graph_sensitivities
from sparse_export.oneshot.graph_inputs import scoring_of
from sparse_export.oneshot.graph_pruning import CALIBRATION_MEMORY
from sparse_export.oneshot.graph_source import Told, graph_source
from sparse_export.oneshot.layers import require_method
from sparse_export.oneshot.pipeline import CALIBRATION_BATCH
from sparse_export.oneshot.recovery import NONE, recovery_from_text
from sparse_export.oneshot.source import require_weights, run_of
from sparse_export.oneshot.steps import CALIBRATION_SAMPLES, data_and_task, is_fed_by_loader, task_of
from sparse_export.oneshot.torch_choice import sensitivities
from sparse_export.oneshot.torch_work import torch_work
from sparse_export.sparsity.pattern import pattern_from_text
from sparse_export.tasks.data.picture_settings import PictureSettings
from sparse_export.train.network import n_threads_for
from sparse_export.train.stopping import cpu_settings

__all__ = ["layer_sensitivities"]


def layer_sensitivities(
    model: str | Path,
    *,
    pattern: str = "2:4",
    weights: str | None = None,
    method: str = "magnitude",
    data: str | None = None,
    data_dir: Path | None = None,
    task: str | None = None,
    calibration_samples: int = CALIBRATION_SAMPLES,
    keep_dense: Sequence[str] = (),
    input_shape: Sequence[int] | None = None,
    inputs: str | Path | None = None,
    axes: Sequence[str] = (),
    sizes: Sequence[str] = (),
    calibration_memory: int = CALIBRATION_MEMORY,
    seed: int = 0,
    device: str = "auto",
    trust: str | None = None,
    finished: Finished | None = None,
    timings: str | Path | None = None,
    pictures: PictureSettings | None = None,
    recover: str = NONE,
) -> Sensitivities:
    """Measure what each layer of a trained network changes if it alone is N:M sparse.

    All layers are pruned by one walk, and each is tried by itself on a few of the samples that
    `sparsify(max_drop=)` chooses on.

    Args:
        model: as of `sparsify`, as are all others.

    Returns:
        The layers, those first that save most for what they change.

    Raises:
        SparseExportError: as `sparsify`.
    """
    model = str(model)
    asked, chosen = pattern_from_text(pattern), require_method(method)
    recovery = recovery_from_text(recover)
    require_numbers(calibration_samples, 0, seed)
    data, task = data_and_task(model, data, task, data_dir)
    told = Told(
        axes=axes, sizes=sizes, inputs=None if inputs is None else Path(inputs), data=data, data_dir=data_dir
    )
    bound = bound_of(None, timings, None, pattern=asked, measures=True)
    assert bound is not None
    if data is None and inputs is not None:
        bound, task = with_answers_of_dense(bound, task)
    in_torch = is_fed_by_loader(model, data)
    graph = graph_source(
        model, told, weights=weights, input_shape=input_shape, seed=seed, trust=trust, in_torch=in_torch
    )
    if graph is not None:
        return graph_sensitivities(
            graph,
            pattern=asked,
            method=chosen,
            inputs=told.inputs,
            calibration_samples=calibration_samples,
            bound=bound,
            keep_dense=keep_dense,
            memory_bytes=calibration_memory,
            seed=seed,
            observer=finished,
            scoring=scoring_of(
                graph,
                task,
                data,
                data_dir,
                pictures,
                calibration_samples=calibration_samples,
            ),
            recovery=recovery,
        )
    run = run_of(model)
    require_weights(model, run, weights)
    task = task or task_of(run)
    data = require_scored(data_name(data, run, chosen, finetune=0, moving=False, norms=False, errors=False))
    work, _ = torch_work(
        *(model, run),
        weights=weights,
        data=data,
        data_dir=data_dir,
        task=task,
        input_shape=input_shape,
        seed=seed,
        device=device,
        pictures=pictures,
        trust=trust,
        calibration_samples=calibration_samples,
        calibration_memory=calibration_memory,
        recovery=recovery,
    )
    caps, _ = work.caps(asked, keep_dense, None)
    with cpu_settings(n_threads_for(work.network, CALIBRATION_BATCH)):
        return sensitivities(work, caps, chosen, bound, finished)
