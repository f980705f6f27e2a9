"""The pure core of sparse training: functions of tensors, with no optimiser, module or file in sight."""

from __future__ import annotations

from sparse_export.sparsity.caps import Cap
from sparse_export.sparsity.eligible import capped_layers
from sparse_export.sparsity.gradual import prune_masks
from sparse_export.sparsity.pattern import NMPattern, pattern_from_text
from sparse_export.sparsity.permute import find_permutation
from sparse_export.sparsity.prune import Prune, largest_of_all
from sparse_export.sparsity.schedule import PruneSchedule, cap_size, gradual_density, prune_rate
from sparse_export.sparsity.start import Distribution, layer_counts, random_masks
from sparse_export.sparsity.update import MaskUpdate, Redistribution, update_masks

__all__ = [
    "Cap",
    "Distribution",
    "MaskUpdate",
    "NMPattern",
    "Prune",
    "PruneSchedule",
    "Redistribution",
    "cap_size",
    "capped_layers",
    "find_permutation",
    "gradual_density",
    "largest_of_all",
    "layer_counts",
    "pattern_from_text",
    "prune_masks",
    "prune_rate",
    "random_masks",
    "update_masks",
]
