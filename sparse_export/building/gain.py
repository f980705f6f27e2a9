"""What makes a sparse network of zeros in any place faster on a CPU, in a sentence."""

from __future__ import annotations

from collections.abc import Iterable

from sparse_export.formats.bundle import BundleInfo
from sparse_export.formats.run import LayerInfo, RunInfo
from sparse_export.train.methods import METHODS

__all__ = ["gain_of_bundle", "gain_of_run"]

_PRESET = "`sparse-export train RECIPE --preset compact` leaves whole channels empty"
_FEW = 0.9
"""Share of the parameters that are left, above which compaction is said to have removed little."""


def gain_of_run(info: RunInfo, run: str) -> str:
    """How a finished training becomes faster on a CPU.

    Args:
        info: of the run.
        run: its path, as a command has it.

    Returns:
        A sentence; empty for dense networks, patterns, and runs that `train` did not make.
    """
    if not _has_zeros_anywhere(info.method, info.density, info.layers):
        return ""
    if info.recipe.get("sparsity", {}).get("narrowing"):
        return f"on a CPU: `sparse-export build {run} --compact` removes the channels that are empty"
    return f"on a CPU zeros alone gain nothing; {_PRESET}, which build --compact removes"


def gain_of_bundle(info: BundleInfo) -> str:
    """How a bundle becomes faster on a CPU.

    Args:
        info: of the bundle.

    Returns:
        A sentence; empty where channels were removed, and as for `gain_of_run`.
    """
    if not _has_zeros_anywhere(info.method, info.density, info.layers):
        return ""
    found = info.compacted
    if found is None:
        return f"on a CPU zeros alone gain nothing; --compact removes empty channels, and {_PRESET}"
    if found.n_weights_after > _FEW * found.n_weights_before:
        return f"few channels were empty; {_PRESET}"
    return ""


def _has_zeros_anywhere(method: str, density: float, layers: Iterable[LayerInfo]) -> bool:
    """Was it trained sparse here, without a pattern that hardware could use?"""
    return method in METHODS and density < 1 and not any(layer.pattern for layer in layers)
