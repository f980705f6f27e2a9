"""Part `trained`: short trainings on real data."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import Case
from sparse_export.train.loop import train
from sparse_export.train.recipe import load_recipe


def trained(setting: Setting) -> Iterator[Case]:
    """Short trainings on real data, sparse and dense, and sparse without a CUDA graph: that they learn, and
    how fast.

    The data folder is in the variable SPARSE_EXPORT_DATA.
    """
    graph = setting.device == "cuda"
    kinds = ((False, graph), (True, graph), *(((False, False),) if graph else ()))
    for recipe, epochs in setting.trained:
        for dense, cuda_graph in kinds:
            with tempfile.TemporaryDirectory() as folder:
                changes = {"epochs": epochs, "dense": dense, "cuda_graph": cuda_graph}
                run = train(load_recipe(recipe, changes=changes), Path(folder) / "run", device=setting.device)
                info = run.info
                assert info.test is not None
                assert info.data is not None
                n_steps = epochs * (info.data.n_train // info.recipe["batch_size"])
                yield {
                    "recipe": recipe,
                    "dense": dense,
                    "cuda_graph": cuda_graph,
                    "epochs": epochs,
                    "n_weights": sum(layer.n_weights for layer in info.layers),
                    "n_active": sum(layer.n_active for layer in info.layers),
                    "test_percent": info.test.figure,
                    "steps_per_s": n_steps / info.seconds,
                    "seconds": info.seconds,
                }
