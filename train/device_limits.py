"""What a recipe asks of a device and of this machine, and what they cannot do."""

from __future__ import annotations

import os
import shutil

import torch

from sparse_export.errors import MissingCapability, UsageError
from sparse_export.sparsity.product24 import require_backend
from sparse_export.train import step24
from sparse_export.train.distributed import World
from sparse_export.train.recipe import Recipe

__all__ = ["require_possible"]


def require_possible(recipe: Recipe, device: torch.device, world: World) -> None:
    """Raise UsageError or MissingCapability for what this device cannot do."""
    if recipe.sparsity.products == "csr" and not recipe.dense and (device.type != "cpu" or world.size > 1):
        raise UsageError(
            f"CSR products were asked for on {device.type}, with {world.size} processes.",
            expected="One process on the CPU was expected.",
            do="Train with --device cpu, or with dense products.",
        )
    if recipe.sparsity.products == "2:4" and not recipe.dense:
        require_backend(step24.BACKEND_24, device)
    if recipe.sync_batch_norm and device.type != "cuda":
        raise UsageError(
            f"sync_batch_norm is set, and the device is {device.type}.",
            expected="A CUDA device was expected: torch has no such layer elsewhere.",
            do="Leave sync_batch_norm out of the recipe.",
        )
    if recipe.cuda_graph and (device.type != "cuda" or world.size > 1):
        raise UsageError(
            f"cuda_graph is set, on {device.type} with {world.size} process{'es' if world.size > 1 else ''}.",
            expected="One process on a CUDA device was expected.",
            do="Leave cuda_graph out of the recipe.",
        )
    if recipe.compile:
        _require_compiler(device)


def _require_compiler(device: torch.device) -> None:
    """Raise MissingCapability where torch.compile would not find the compiler that it calls."""
    variable, compilers = (
        ("CXX", ("g++", "clang++")) if device.type == "cpu" else ("CC", ("gcc", "clang", "cc"))
    )
    wanted = (os.environ[variable],) if os.environ.get(variable) else compilers
    if not any(shutil.which(name) for name in wanted):
        raise MissingCapability(
            f"compile is set, and no compiler is there: looked for {', '.join(wanted)}.",
            expected="One was expected, which torch.compile calls.",
            do="Install one (on Debian and Ubuntu: apt install g++), or leave compile out of the recipe.",
        )
