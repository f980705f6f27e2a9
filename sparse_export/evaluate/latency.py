"""What timing a bundle found: the value that is written and shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from sparse_export.files import write_json
from sparse_export.instruments.conditions import Conditions, clock_notes, conditions_text, onnxruntime_text
from sparse_export.instruments.interleave import LatencyResult
from sparse_export.instruments.statistics import Location, Ratio
from sparse_export.tables import Shown, Table, count_text, ms_text

__all__ = ["Bench", "BenchRow", "NotTimed", "at_batch", "write_bench"]

RESULT_FILE = "bench.json"


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One runtime at one batch size; a call is of `batch` samples and ends with logits in host memory.

    Attributes:
        runtime: as the session names itself.
        file: of the bundle, that it ran.
        latency: the timed session.
        latency_ms: of an undisturbed call, with its 95 % interval over rounds.
        samples_per_s: batch / mean time of all calls, disturbed ones included; calls follow one another.
        device, device_ms: the same of the work on the device alone, by CUDA events, the input lying there
            already; None where the runtime cannot say.
        control: that session / another one of the same file, which differs from 1 only by what cannot be
            resolved here.
        floor: the farthest end of its interval from 1.
    """

    runtime: str
    file: str
    batch: int
    latency: LatencyResult
    again: LatencyResult
    latency_ms: Location
    samples_per_s: float
    control: Ratio
    floor: float
    device: LatencyResult | None = None
    device_ms: Location | None = None


@dataclass(frozen=True, kw_only=True)
class NotTimed:
    """A runtime, or one batch size of it, that was to be timed and could not be.

    Attributes:
        why: in words.
    """

    runtime: str
    batch: int | None
    why: str


@dataclass(frozen=True, kw_only=True)
class Bench(Conditions):
    """Everything that `bench` measured; `str()` gives the table for people.

    Attributes:
        size_bytes: of model.onnx and its external data.
        cuda_graphs: engines replayed their launches.
    """

    path: str
    model: str | None
    method: str
    density: float
    precision: str
    size_bytes: int
    rows: tuple[BenchRow, ...]
    not_timed: tuple[NotTimed, ...]
    cuda_graphs: bool = False

    def shown(self) -> Shown:
        """A row for each runtime and batch, notes, and the conditions of the measurement."""
        what = self.model or "a network of your own"
        title = (
            f"{self.path}: {what}, {self.method}, density {self.density:.4g}, {self.precision}, model.onnx "
            f"{self.size_bytes:,} bytes"
        )
        head: tuple[str, ...] = (
            "runtime",
            "batch",
            "p50 ms",
            "p90 ms",
            "p99 ms",
            "calls",
            "samples/s",
            "undisturbed ms [95 %]",
            "floor",
        )
        rows = [_row(row) for row in self.rows]
        if any(row[-1] for row in rows):
            head = (*head, "")
        else:
            rows = [row[:-1] for row in rows]
        table = Table(head=head, rows=rows, right=(1, 2, 3, 4, 5, 6, 8))
        conditions = conditions_text(self, onnxruntime_text(self))
        return Shown([title, table, "\n".join((*_notes(self), conditions))])

    def __str__(self) -> str:
        return self.shown().draw()


def at_batch(batch: int | None) -> str:
    """As part of a sentence; nothing for every batch."""
    return "" if batch is None else f" at batch {batch}"


def _row(row: BenchRow) -> tuple[str, ...]:
    at = row.latency
    return (
        row.runtime,
        str(row.batch),
        ms_text(at.median_ms),
        ms_text(at.p90_ms),
        ms_text(at.p99_ms),
        count_text(at.n_calls),
        f"{row.samples_per_s:,.0f}",
        _location_text(row.latency_ms),
        f"{100 * (row.floor - 1):.1f} %",
        "" if at.steady and row.again.steady else "not steady",
    )


def _location_text(ms: Location) -> str:
    return f"{ms_text(ms.estimate)} [{ms_text(ms.low)}, {ms_text(ms.high)}]"


def _notes(result: Bench) -> list[str]:
    """What is to be said below the figures, a paragraph each."""
    explained = (
        "floor: by how much two copies of this very file differ here; smaller differences mean nothing. A "
        "99th percentile is given from 1,000 calls on."
    )
    notes = [explained]
    for row in result.rows:
        if row.device_ms is not None:
            notes.append(
                f"{row.runtime} at batch {row.batch}: {_location_text(row.device_ms)} ms on the device "
                "alone, by CUDA events, without copies to and from the host."
            )
    if result.cuda_graphs:
        notes.append("Engines replayed CUDA graphs.")
    if any(not row.latency.steady for row in result.rows):
        notes.append("not steady: times had not settled when warm-up ended; repeat on a quiet machine.")
    notes += clock_notes(result.cards)
    notes += [f"Not timed: {one.runtime}{at_batch(one.batch)}: {one.why}" for one in result.not_timed]
    engines = dict.fromkeys((row.runtime, row.file) for row in result.rows if row.file.startswith("engines/"))
    return notes + [f"{runtime} ran {file}." for runtime, file in engines]


def write_bench(folder: Path, result: Bench) -> Path:
    """Write `bench.json`, raw samples included, into a folder, which is made when absent.

    Returns:
        Its path.

    Raises:
        OutputError: it cannot be written.
    """
    path = Path(folder) / RESULT_FILE
    write_json(path, {"kind": "bench", **asdict(result)})
    return path
