"""Plans a network by its name, or that of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from sparse_export import models
from sparse_export.errors import MissingCapability, UsageError
from sparse_export.files import put_back
from sparse_export.formats.layer_plan import LayerPlan
from sparse_export.formats.run import open_run
from sparse_export.formats.timings import Size, Timings, read_timings
from sparse_export.models.run_network import network_of_run
from sparse_export.plan.fold_norms import fold_batch_norm
from sparse_export.plan.layers import Product, products_of
from sparse_export.plan.planning import make_plan
from sparse_export.plan.timing import measure_timings
from sparse_export.plan.whole import WholeNetwork, measure_whole
from sparse_export.sparsity.product24 import Backend

__all__ = ["DTYPES", "plan_network", "require_gpu", "verify_plan"]

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def plan_network(
    model: str | Path,
    *,
    batch: int = 32,
    dtype: Literal["fp16", "bf16"] = "fp16",
    backend: Backend = "cusparselt",
    speedup: float | None = None,
    max_sparse_loss: float | None = None,
    timings: Path | None = None,
    rounds: int = 24,
    trust: str | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> tuple[LayerPlan, Timings]:
    """Measure, or read, the times of each layer's product dense and as 2:4, and choose layers by `make_plan`.

    Args:
        model: a network's name, whose random weights then stand for trained ones, or the folder of a run.
        batch: samples in a call, 1 at least.
        dtype: of the products.
        backend: of the 2:4 products.
        speedup: as of `make_plan`.
        max_sparse_loss: as of `make_plan`.
        timings: a file to read instead of measuring, whose dtype and backend then count.
        rounds: of the measurement.
        trust: SHA-256 of a run's `run.json`, see `sparse_export.models.run_network.network_of_run`.
        on_progress: called with a line for people.

    Returns:
        The plan, and the timings.

    Raises:
        UsageError: an option is invalid, or the timings do not fit the network.
        UnknownNameError: there is no such network.
        ArtefactError: a file is damaged.
        NotTrustedError: this user does not vouch for the run's factory.
        SpeedupNotReached: as `make_plan`.
        MissingCapability: there is no GPU and no timings are given; nothing else has a 2:4 product.
    """
    if batch < 1:
        raise UsageError(f"The batch is {batch}.", do="Give 1 or more.")
    read = None if timings is None else read_timings(_file(timings))
    if read is None:
        require_gpu()
    if read is not None:
        dtype_, backend = _dtype(read.dtype), _backend(read.backend)
    else:
        dtype_ = DTYPES[dtype]
    network, name, shape, weights = _network(model, trust)
    products = products_of(network, shape, batch, dtype_, backend)
    if read is None:
        fold_batch_norm(network.eval(), torch.zeros((1, *shape)))  # as every engine does it
        read = measure_timings(
            network,
            shape,
            _sizes(products),
            name=name,
            batch=batch,
            dtype=dtype_,
            backend=backend,
            device=torch.device("cuda"),
            rounds=rounds,
            on_progress=on_progress,
        )
    plan = make_plan(
        products,
        read,
        model=name,
        batch=batch,
        weights=weights,
        speedup=speedup,
        max_sparse_loss=max_sparse_loss,
    )
    return plan, read


def verify_plan(
    model: str | Path,
    plan: LayerPlan,
    *,
    rounds: int = 24,
    trust: str | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> WholeNetwork:
    """Time the whole network on the GPU, dense and as planned, by `measure_whole`.

    Args:
        model: as of `plan_network`.
        plan: its plan.
        rounds: of the measurement.
        trust: as of `plan_network`.
        on_progress: called with a line for people.

    Raises:
        SparseExportError: as `plan_network` and `measure_whole`.
    """
    require_gpu()
    dtype, backend = _dtype(plan.dtype), _backend(plan.backend)
    network, name, shape, _ = _network(model, trust)
    products = products_of(network, shape, plan.batch, dtype, backend)
    return measure_whole(
        network,
        shape,
        [one.name for one in products if one.reason is None],
        plan.sparse,
        name=name,
        batch=plan.batch,
        dtype=dtype,
        backend=backend,
        device=torch.device("cuda"),
        expected=plan.expected_speedup,
        rounds=rounds,
        on_progress=on_progress,
    )


def require_gpu() -> None:
    """Check that there is a GPU; nothing else has a 2:4 product.

    Raises:
        MissingCapability: torch sees no CUDA device.
    """
    if not torch.cuda.is_available():
        raise MissingCapability(
            "This machine has no 2:4 product to measure: torch sees no CUDA device.",
            do="Plan on the machine that will serve the network, with an NVIDIA GPU of compute "
            "capability 8.0 "
            "or newer, or give its measurements by --timings FILE, without --verify.",
        )


def _file(path: Path) -> Path:
    """The path of a timings file. Raises UsageError where there is none."""
    if not Path(path).is_file():
        raise UsageError(
            f"The timings {path} are not a file.",
            do="Write them on a machine with a GPU: `sparse-export plan MODEL --keep-timings FILE`.",
        )
    return Path(path)


def _dtype(name: str) -> torch.dtype:
    """The dtype of a timings file. Raises UsageError for another name."""
    found: Any = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise UsageError(f"The timings are of {name!r}, which is no dtype of torch.", do="Measure again.")
    return found


def _backend(name: str) -> Backend:
    """The backend of a timings file. Raises UsageError for another name."""
    if name in ("cusparselt", "cutlass", "reference"):
        return name  # type: ignore[return-value]
    raise UsageError(
        f"The timings are of the backend {name!r}, not cusparselt or cutlass.", do="Measure again."
    )


def _network(
    model: str | Path, trust: str | None
) -> tuple[torch.nn.Module, str | None, tuple[int, ...], str]:
    """The network, its name, the shape of one sample, and whose weights it has."""
    put_back(Path(model))
    if Path(model).is_dir():
        run = open_run(Path(model))
        return (
            network_of_run(run, trusted=trust),
            run.info.model.name,
            run.info.signature.input_shape,
            str(run.path),
        )
    name = str(model)
    shape = models.input_shape(name)
    if shape is None:
        raise UsageError(
            f"The input shape of {name} is not known.",
            do="Give a known network, timm:NAME or a run; one epoch of training makes a run.",
        )
    torch.manual_seed(0)
    return models.create(name), name, shape, "random weights"


def _sizes(products: tuple[Product, ...]) -> set[Size]:
    """The sizes of the products that can be 2:4."""
    return {
        (one.n_outputs, one.n_inputs, one.n_rows)
        for one in products
        if one.reason is None and one.n_rows is not None
    }
