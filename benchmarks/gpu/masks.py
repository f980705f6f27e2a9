"""Part `masks`: what sparse momentum adds to a training step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import Case
from sparse_export.evaluate.bench_train import bench_training_step


def masks(setting: Setting) -> Iterator[Case]:
    """What sparse momentum adds to a step with dense products, and a mask update."""
    for recipe, batch in setting.recipes:
        result = bench_training_step(
            recipe,
            rounds=setting.rounds,
            block_s=setting.block_s,
            warmup_limit_s=setting.warmup_limit_s,
            device=setting.device,
            batch_size=batch,
        )
        yield {
            "recipe": recipe,
            "batch": batch,
            "dense / sparse": asdict(result.ratio),
            "floor": result.floor,
            "part_ms": {"dense": result.dense.part_ms, "sparse": result.sparse.part_ms},
            "update_median_ms": sorted(result.update_ms)[len(result.update_ms) // 2]
            if result.update_ms
            else None,
            "samples_ms": {
                "dense": list(result.dense.latency.samples_ms),
                "sparse": list(result.sparse.latency.samples_ms),
                "update": list(result.update_ms),
            },
        }
