"""Makes a trained network N:M sparse in one shot, step by step with its accuracy, and fine-tunes it."""

from __future__ import annotations

from sparse_export.oneshot.dry_run import layer_sensitivities
from sparse_export.oneshot.report import SparsifiedLayer, SparsifyReport, Stage
from sparse_export.oneshot.steps import Sparsified, sparsify

__all__ = ["Sparsified", "SparsifiedLayer", "SparsifyReport", "Stage", "layer_sensitivities", "sparsify"]
