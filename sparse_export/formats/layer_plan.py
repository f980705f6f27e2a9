"""A layer plan, by `plan`: which weights are to be made 2:4, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from sparse_export.errors import UsageError
from sparse_export.files import write_json
from sparse_export.formats.document import SCHEMA_VERSION, read_document
from sparse_export.instruments.statistics import Ratio


@dataclass(frozen=True, kw_only=True)
class PlannedLayer:
    """One weight of a layer plan.

    Attributes:
        name: of the weight.
        n_outputs: rows of the weight.
        n_inputs: columns of the weight.
        n_rows: rows of activations in one call; None where not known.
        sparse: it is to be 2:4.
        why: the reason, in words.
        ratio: dense / 2:4 time of its product; None where that was not timed.
        saved_ms: of one call of the network, at the low end of the ratio's interval.
        lost: share of sum |w| over all weights that 2:4 drops; None where not counted.
    """

    name: str
    n_outputs: int
    n_inputs: int
    n_rows: int | None
    sparse: bool
    why: str
    ratio: Ratio | None
    saved_ms: float
    lost: float | None


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """Content of a layer plan.

    Attributes:
        model: name of the network, None where it has none.
        batch: samples in a call.
        dtype: of the products.
        backend: of the 2:4 products.
        device: the GPU that timings are from.
        weights: whose magnitudes were counted, a run's folder or `random`.
        speedup: the speed-up that was requested, None for none.
        max_sparse_loss: the largest `lost` that was allowed, None for any.
        model_ms: of the dense network at `batch` on `device`.
        saved_ms: total of the chosen layers.
        lost: total of the chosen layers.
        expected_speedup: model_ms / (model_ms - saved_ms), from times of single products: to be measured, not
            promised.
        layers: of the network.
        versions: of the libraries.
        command: that made it.
        created: time in ISO 8601.
    """

    model: str | None
    batch: int
    dtype: str
    backend: str
    device: str
    weights: str
    speedup: float | None
    max_sparse_loss: float | None
    model_ms: float
    saved_ms: float
    lost: float
    expected_speedup: float
    layers: tuple[PlannedLayer, ...]
    versions: dict[str, str]
    command: tuple[str, ...]
    created: str
    kind: Literal["plan"] = "plan"
    schema_version: int = SCHEMA_VERSION

    @property
    def sparse(self) -> tuple[str, ...]:
        """Weights that are to be 2:4."""
        return tuple(layer.name for layer in self.layers if layer.sparse)

    @property
    def dense(self) -> tuple[str, ...]:
        """Weights that are to stay dense."""
        return tuple(layer.name for layer in self.layers if not layer.sparse)


def read_layer_plan(path: Path) -> LayerPlan:
    """Read a layer plan.

    Args:
        path: of the file.

    Raises:
        UsageError: there is no file.
        ArtefactError: it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(
            f"The layer plan {path} is not a file.",
            do="Make one with `sparse-export plan MODEL --out FILE`.",
        )
    plan: LayerPlan = read_document(path, "plan", LayerPlan)
    return plan


def write_layer_plan(path: Path, plan: LayerPlan) -> None:
    """Write a layer plan.

    Args:
        path: of the file.
        plan: the plan.

    Raises:
        OutputError: it cannot be written.
    """
    write_json(Path(path), asdict(plan))
