"""Makes a bundle from a run: the network as ONNX, with what is needed to check it anywhere."""

from __future__ import annotations

from sparse_export.building.bundle import build, build_from_request, dry_run
from sparse_export.building.golden import GOLDEN_INPUT, GOLDEN_OUTPUT
from sparse_export.building.model_files import DENSE_MODEL_FILE, MODEL_FILE
from sparse_export.building.request import BuildRequest
from sparse_export.models.run_network import masks_of_run, network_of_run

__all__ = [
    "DENSE_MODEL_FILE",
    "GOLDEN_INPUT",
    "GOLDEN_OUTPUT",
    "MODEL_FILE",
    "BuildRequest",
    "build",
    "build_from_request",
    "dry_run",
    "masks_of_run",
    "network_of_run",
]
