"""What timing a training step found: the value that is written and shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparse_export.evaluate.verdict import speedup_not_reached, times_text
from sparse_export.files import write_json
from sparse_export.formats.run import ProductInfo
from sparse_export.instruments.conditions import Conditions, conditions_text
from sparse_export.instruments.interleave import LatencyResult
from sparse_export.instruments.outcome import reaches
from sparse_export.instruments.statistics import Ratio
from sparse_export.tables import Shown, Table, ms_text

__all__ = ["PARTS", "Phases", "StepBench", "StepTimes", "check_speedup", "write_step_bench"]

PARTS = ("forward", "backward", "optimizer", "masks")
RESULT_FILE = "bench-train.json"


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """One network's steps.

    Attributes:
        samples_per_s: batch / mean time.
        part_ms: mean ms of each of PARTS over all timed steps, which add up where medians do not: forward
            with the loss, backward, the optimiser with its zeroing of gradients, and whatever keeps the
            network sparse, mask updates left out.
    """

    latency: LatencyResult
    steps_per_s: float
    samples_per_s: float
    part_ms: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Phases:
    """The two kinds of steps that training with CSR products has, see `sparse_export.train.step_csr.StepCsr`.

    Attributes:
        window: steps with dense gradients before an update, window_steps of them in update_every; all others
            train active weights alone.
        mean_ms: of a step over a whole update interval, the update and the changes between the two kinds
            included.
        between, within: dense / sparse for steps outside and inside the window, without any share of an
            update.
    """

    window: StepTimes
    window_steps: int
    mean_ms: float
    between: Ratio
    within: Ratio


@dataclass(frozen=True, kw_only=True)
class StepBench(Conditions):
    """Everything that `bench-train` measured; `str()` gives the table for people.

    Attributes:
        input_shape: of one sample; () where there are several inputs.
        inputs: of one sample, by the names of several inputs; else empty.
        update_ms: one mask update a round.
        update_every: steps that share one.
        ratio: dense / sparse, each sparse step with its share of an update, and of dense windows where there
            are any, above 1 when sparse is faster.
        products, phases: where the recipe asks for CSR products, what was chosen for each masked weight, and
            the kinds of steps; no phases where dense products were chosen for all. `sparse` is then a step
            outside the window.
        control: dense / another dense network.
        floor, outcome, verdict: as in `sparse_export.evaluate.comparison.LatencyComparison`.
    """

    recipe: dict[str, Any]
    model: str
    input_shape: tuple[int, ...]
    batch: int
    density: float
    device: str
    dense: StepTimes
    dense_again: StepTimes
    sparse: StepTimes
    update_ms: tuple[float, ...]
    update_every: int | None
    ratio: Ratio
    control: Ratio
    floor: float
    outcome: str
    verdict: str
    required_speedup: float | None
    products: tuple[ProductInfo, ...] = ()
    phases: Phases | None = None
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def shown(self) -> Shown:
        """Dense beside sparse, part by part, then the chosen products, the verdict and the conditions."""
        compiled = ", compiled" if self.recipe["compile"] else ""
        of = ", ".join(f"{name} {shape}" for name, shape in self.inputs.items()) or str(self.input_shape)
        title = (
            f"{self.model}, batches of {self.batch} of {of}, density {self.density:.4g}, "
            f"{self.recipe['precision']}{compiled}, on {self.device}"
        )
        rows = [(name, ms_text(dense), ms_text(sparse), note) for name, dense, sparse, note in _rows(self)]
        table = Table(head=("", "dense", "sparse", ""), rows=rows, right=(1, 2))
        products = "\n".join(f"{one.name} by {one.by}: {one.reason}" for one in self.products)
        by = f"torch {self.versions['torch']}"
        conditions = conditions_text(
            self, by, "one batch, again and again", "learning rate 0", "95 % intervals"
        )
        return Shown([title, table, *([products] if products else []), self.verdict, conditions])

    def __str__(self) -> str:
        return self.shown().draw()


def _rows(result: StepBench) -> list[tuple[str, float, float, str]]:
    dense, sparse = result.dense, result.sparse
    one, other = dense.latency, sparse.latency
    rows: list[tuple[str, float, float, str]] = [
        ("steps/s", dense.steps_per_s, sparse.steps_per_s, ""),
        ("samples/s", dense.samples_per_s, sparse.samples_per_s, ""),
        ("median ms a step", one.median_ms, other.median_ms, f"{result.ratio} as fast"),
        ("mean ms a step", one.mean_ms, other.mean_ms, ""),
        *((f"  {name}", dense.part_ms[name], sparse.part_ms[name], "") for name in dense.part_ms),
        ("90th percentile ms", one.p90_ms, other.p90_ms, ""),
    ]
    if result.phases is not None:
        phases = result.phases
        window = phases.window.latency.mean_ms
        rows.append(("in the window, mean ms", one.mean_ms, window, f"{phases.window_steps} steps"))
        rows.append(("all in all, mean ms", one.mean_ms, phases.mean_ms, "with its share of an update"))
    again = result.dense_again.latency.median_ms
    rows.append(("control: dense twice", one.median_ms, again, f"{result.control} should hold 1"))
    return rows


def check_speedup(result: StepBench) -> None:
    """Check the speed-up that was required, if one was.

    Raises:
        SpeedupNotReached: it was not measured.
    """
    wanted = result.required_speedup
    if wanted is not None and not reaches(result.outcome, result.ratio, wanted):
        what = f"The training step's speed-up is {times_text(result.ratio)}."
        raise speedup_not_reached(
            what, wanted, do="Read the verdict: masks alone do not make a step shorter."
        )


def write_step_bench(folder: Path, result: StepBench) -> Path:
    """Write `bench-train.json`, raw samples included, into a folder, which is made when absent.

    Returns:
        Its path.

    Raises:
        OutputError: it cannot be written.
    """
    path = Path(folder) / RESULT_FILE
    write_json(path, {"kind": "bench-train", **asdict(result)})
    return path
