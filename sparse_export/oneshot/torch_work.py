"""Opens a torch network by its name, or of a run, with the data that it is calibrated and scored on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparse_export.formats.run import Run
from sparse_export.oneshot.arguments import (
    input_shape_of,
    n_outputs_of,
    require_same_data,
    require_usable_weights,
)
from sparse_export.oneshot.fine_tuning import loader_recipe
from sparse_export.oneshot.graph_pruning import CALIBRATION_MEMORY
from sparse_export.oneshot.pipeline import Work
from sparse_export.oneshot.recovery import Recovery
from sparse_export.oneshot.source import open_source
from sparse_export.tasks.data.picture_settings import PictureSettings
from sparse_export.tasks.shipped import task_named
from sparse_export.train.batches import batch_loader
from sparse_export.train.distributed import ALONE
from sparse_export.train.loop import device_of
from sparse_export.train.recipe import Recipe

__all__ = ["torch_work"]


def torch_work(
    model: str,
    run: Run | None,
    *,
    weights: str | None,
    data: str | None,
    data_dir: Path | None,
    task: str,
    input_shape: Sequence[int] | None,
    seed: int,
    device: str,
    pictures: PictureSettings | None,
    trust: str | None = None,
    epochs: int = 0,
    calibration_samples: int = 1,
    calibration_memory: int = CALIBRATION_MEMORY,
    recovery: Recovery | None = None,
) -> tuple[Work, Recipe | None]:
    """Open a torch network and its data, ready to be pruned or scored.

    Args:
        model: as of `sparsify`, as are all others.
        run: that MODEL is the folder of; None for a name.
        data: a data set; None for none.
        epochs: of training afterwards.

    Returns:
        The network on its way, and the recipe by which its data are read and it is trained; None without data.

    Raises:
        SparseExportError: as `sparsify` raises of its source and its data.
    """
    place = device_of(device)
    recipe = loader = None
    if data is not None:
        recipe = loader_recipe(
            model, run, data, input_shape, epochs=epochs, seed=seed, task=task, pictures=pictures
        )
        loader = batch_loader(recipe, data_dir, False, place, ALONE)
        if run is not None and run.info.data is not None:
            require_same_data(run, loader.info)
    n_classes = None if loader is None else loader.n_outputs
    source = open_source(model, run, weights, n_classes=n_classes, seed=seed, trust=trust)
    require_usable_weights(source)
    shape, known = input_shape_of(source, run, loader, input_shape), task_named(task)
    n_outputs = n_outputs_of(source, shape, n_classes, known)
    work = Work(
        *(source, shape, n_outputs, loader, place, calibration_samples, seed, known, calibration_memory),
        recovery=recovery,
        augments=recipe is not None and recipe.augment == "crop-flip" and len(shape) == 3,
    )
    return work, recipe
