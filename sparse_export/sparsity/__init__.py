"""The pure core of sparse training: functions of tensors, with no optimiser, module or file in sight."""

from __future__ import annotations

from sparse_export.sparsity.schedule import PruneSchedule, prune_rate
from sparse_export.sparsity.start import Distribution, layer_counts, random_masks
from sparse_export.sparsity.update import MaskUpdate, Redistribution, update_masks

__all__ = [
    "Distribution",
    "MaskUpdate",
    "PruneSchedule",
    "Redistribution",
    "layer_counts",
    "prune_rate",
    "random_masks",
    "update_masks",
]
