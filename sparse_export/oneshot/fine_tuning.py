"""Trains a sparsified network on: by which recipe, from where, and what the report says then."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sparse_export.errors import UsageError
from sparse_export.files import write_json
from sparse_export.formats.run import Run, RunInfo
from sparse_export.oneshot.pipeline import Work
from sparse_export.oneshot.report import (
    REPORT_FILE,
    SparsifyReport,
    Stage,
    method_name,
    promised,
    why_dense,
)
from sparse_export.tasks.data.picture_settings import PictureSettings
from sparse_export.train.layers import maskable_parameters
from sparse_export.train.loop import train
from sparse_export.train.observer import Observer, SilentObserver
from sparse_export.train.recipe import Recipe, recipe_from_table
from sparse_export.train.starting_point import StartingPoint
from sparse_export.train.teacher import OUTPUTS

__all__ = ["fine_tuned", "loader_recipe", "require_patterns"]

_FINE_TUNING: dict[str, Any] = {
    "batch_size": 100,
    "optimizer": {"lr": 0.01},
    "learning_rate": {"schedule": "cosine"},
}
_OF_PICTURES = ("mean", "std", "interpolation", "resize", "classes")
_RATE = 0.1  # of a run's own learning rate
_MOVING_PRUNE_RATE = 0.1
_UPDATES_PER_EPOCH = 5


def loader_recipe(
    model: str,
    run: Run | None,
    data: str,
    input_shape: Sequence[int] | None,
    *,
    epochs: int,
    seed: int,
    task: str,
    pictures: PictureSettings | None = None,
) -> Recipe:
    """How data are fed and the network is fine-tuned: as the run was trained, at a tenth of its learning
    rate, or by defaults. Without epochs it is for the data loader alone.  pictures: how those of a folder
    become inputs; None for what the run has."""
    info = None if run is None else run.info
    name = model if info is None else str(info.model.name)
    shape = input_shape
    if shape is None and info is not None and info.signature.only_input is not None:
        shape = info.signature.input_shape
    table: dict[str, Any] = dict(_FINE_TUNING)
    if info is not None and info.recipe:
        unused = ("sparsity", "distill")
        table = {key: value for key, value in info.recipe.items() if value is not None and key not in unused}
        optimizer = dict(table.get("optimizer", {}))
        table["optimizer"] = optimizer | {"lr": optimizer.get("lr", 0.1) * _RATE}
        table["learning_rate"] = dict(table.get("learning_rate", {})) | {"schedule": "cosine"}
    if data.startswith("imagefolder:") and shape is not None and len(shape) == 3:
        table["image_size"] = list(shape[1:])
    if pictures is not None:
        table |= _picture_keys(pictures, data)
    elif info is not None and info.data is not None and info.data.name != data:
        table = {key: value for key, value in table.items() if key not in _OF_PICTURES}
    if info is not None and info.task.name != task:
        table.pop("loss", None)  # it belongs to what the run was trained for
    table |= {
        "task": task,
        "model": name,
        "data": data,
        "epochs": max(1, epochs),
        "seed": seed,
        "dense": False,
    }
    return recipe_from_table(table, source="for fine-tuning")


def _picture_keys(pictures: PictureSettings, data: str) -> dict[str, Any]:
    """The recipe's keys for pictures; of other data than a folder none."""
    if not data.startswith("imagefolder:"):
        return {}
    is_usual = pictures == PictureSettings(workers=pictures.workers)
    names = ("workers",) if is_usual else ("workers", *_OF_PICTURES)
    return {name: getattr(pictures, name) for name in names if getattr(pictures, name) is not None}


def fine_tuned(
    work: Work,
    report: SparsifyReport,
    recipe: Recipe,
    out: Path,
    *,
    moving: bool,
    data_dir: Path | None,
    device: str,
    observer: Observer | None,
    teacher: Mapping[str, Tensor] | None = None,
    distill: str = OUTPUTS,
) -> tuple[Run, SparsifyReport]:
    """Train on from the pruned network into a run's folder, and leave the report there.

    recipe: of `loader_recipe`.  moving: let the masks move under the pattern.  teacher: the whole
    state of the dense network, whose outputs are learnt in place of targets; None for targets.  distill: whether those of the
    layers are learnt too.  Raises what training raises.
    """
    start = StartingPoint(
        weights=work.network.state_dict(),
        masks=work.masks,
        n_outputs=work.n_outputs,
        method=method_name(report),
        patterns=promised(report),
        why_dense=why_dense(report),
        teacher=teacher,
    )
    recipe = (
        recipe if teacher is None else recipe.model_copy(update={"distill": distill, "label_smoothing": 0.0})
    )
    began = time.monotonic()
    finished = train(
        _fine_tuning(recipe, work, report, moving=moving),
        out,
        data_dir=data_dir,
        device=device,
        observer=_Reporting(out, report, observer or SilentObserver()),
        start=start,
    )
    report = _with_fine_tuned(report, finished.info, time.monotonic() - began)
    write_json(out / REPORT_FILE, asdict(report))
    return finished, report


class _Reporting:
    """An observer that leaves the report in the run's folder once there is one, then tells another
    observer.
    """

    def __init__(self, out: Path, report: SparsifyReport, other: Observer) -> None:
        self._out, self._report = out, report
        self._other = other
        self.stepped, self.finished_epoch = other.stepped, other.finished_epoch

    def started(self, info: RunInfo, total_steps: int, step: int) -> None:
        write_json(self._out / REPORT_FILE, asdict(self._report))
        self._other.started(info, total_steps, step)


def _fine_tuning(recipe: Recipe, work: Work, report: SparsifyReport, *, moving: bool) -> Recipe:
    """The recipe with the masks' density: they stand still, or move under the pattern for three quarters of
    it.

    Raises UsageError for masks that would move where some of them have no pattern to move under.
    """
    n_active = sum(int(mask.sum()) for mask in work.masks.values())
    sparsity: dict[str, Any] = {
        "density": n_active / sum(mask.numel() for mask in work.masks.values()),
        "start": "uniform",
        "rescale": False,
        "keep_dense": [name for name in maskable_parameters(work.network) if name not in work.masks],
    }
    if moving:
        # Again, after `sparsify` asked it of the caps: a layer with one may have gone without calibration.
        require_patterns(work.masks, promised(report))
        assert work.loader is not None
        n_train = work.loader.info.n_train
        steps_per_epoch = n_train // min(recipe.batch_size, n_train)
        sparsity |= {
            "pattern": report.pattern,
            "small_share": 0.0,
            "prune_rate": _MOVING_PRUNE_RATE,
            "update_every": max(1, steps_per_epoch // _UPDATES_PER_EPOCH),
        }
    else:
        sparsity |= {"prune_rate": 0.0, "final_prune_rate": 0.0, "freeze": 0.0}
    table = recipe.model_dump(mode="json", exclude_none=True) | {"sparsity": sparsity}
    return recipe_from_table(table, source="for fine-tuning")


def require_patterns(masks: Collection[str], patterns: Collection[str]) -> None:
    """Raise UsageError where masks would move and some have no pattern to move under.

    Both: names of weights.
    """
    others = sorted(set(masks) - set(patterns))
    if others:
        raise UsageError(
            f"--moving was given, and {', '.join(others)} of the run are sparse without a pattern.",
            expected="Masks that all obey the pattern were expected.",
            do="Fine-tune with fixed masks, or train with --pattern from the start.",
        )


def _with_fine_tuned(report: SparsifyReport, info: RunInfo, seconds: float) -> SparsifyReport:
    n_active = {layer.name: layer.n_active for layer in info.layers}
    stage = Stage(name="fine-tuned", validation=info.validation, test=info.test, seconds=seconds)
    return replace(
        report,
        stages=(*report.stages, stage),
        layers=tuple(replace(layer, n_active=n_active[layer.name]) for layer in report.layers),
    )
