"""Several sparse bundles, each compared with the same dense one, as one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparse_export.errors import GateFailed, UsageError
from sparse_export.evaluate.comparison import (
    RESULT_FILE,
    Comparison,
    change_of_score,
)
from sparse_export.evaluate.verdict import speedup_not_reached, times_text
from sparse_export.files import write_json
from sparse_export.formats.bundle import Bundle
from sparse_export.instruments.conditions import clock_notes, conditions_text, onnxruntime_text
from sparse_export.runtimes.choice import candidates
from sparse_export.tables import Shown, Table, ms_text
from sparse_export.tasks.scores import better_text, value_text

__all__ = ["METHOD", "Candidates", "check_gates", "compare_candidates", "names_of", "write_results"]

METHOD = (
    "Each candidate was timed against the dense bundle in interleaved blocks, one candidate after the other. "
    "So compare candidates by their ratios to dense, not by their milliseconds. All were scored on the same "
    "samples."
)


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Comparisons of several sparse bundles with one dense bundle.

    Attributes:
        names: of the candidates.
        comparisons: of each with the dense bundle, in the order of the names.
    """

    names: tuple[str, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def document(self) -> dict[str, Any]:
        """As JSON."""
        pairs = zip(self.names, self.comparisons, strict=True)
        return {"kind": "candidates", "candidates": {name: asdict(one) for name, one in pairs}}

    def shown(self) -> Shown:
        """A column for each network, the verdicts on their times, and how it was measured."""
        first = self.comparisons[0]
        pairs = list(zip(self.names, self.comparisons, strict=True))
        paths = [("dense", first.dense.path), *((name, one.sparse.path) for name, one in pairs)]
        known = first.dense.score or first.sparse.score
        title = "score" if known is None else known.name
        title += f", {better_text(known)}" if known is not None and not known.higher_is_better else ""
        sides = [first.dense, *(one.sparse for one in self.comparisons)]
        rows = [
            [title, *(value_text(side.score) for side in sides)],
            ["  against dense", "", *(change_of_score(one) for one in self.comparisons)],
            ["density of masked layers", *(f"{side.density:.4f}" for side in sides)],
            ["precision", *(side.precision for side in sides)],
            ["model.onnx, bytes", *(f"{side.size_bytes:,}" for side in sides)],
            ["nonzero parameters", *(f"{side.n_nonzero:,}" for side in sides)],
        ]
        for n, of_first in enumerate(first.latency):
            at = [one.latency[n] for one in self.comparisons]
            rows += [
                [""] * (len(sides) + 1),
                [f"batch {of_first.batch}, median ms", "", *(ms_text(one.sparse.median_ms) for one in at)],
                ["  dense beside it, ms", "", *(ms_text(one.dense.median_ms) for one in at)],
                ["  dense / sparse time", "", *(times_text(one.ratio) for one in at)],
                ["  dense / dense again", "", *(times_text(one.control) for one in at)],
            ]
        numbers = range(1, len(sides) + 1)
        verdicts = [f"{name}: {at.verdict}" for name, one in pairs for at in one.latency]
        failed = [f"FAILED: {name}: {missed}" for name, missed in self._missed()]
        notes = "95 % intervals over all looks at the times"
        conditions = conditions_text(first, onnxruntime_text(first, first.runtime), notes, at_most=True)
        clocks = list(dict.fromkeys(note for _, one in pairs for note in clock_notes(one.cards)))
        table = Table(head=["", "dense", *self.names], rows=rows, right=numbers)
        return Shown([Table(rows=paths), table, *verdicts, METHOD, *clocks, *failed, conditions])

    def _missed(self) -> list[tuple[str, str]]:
        return [
            (name, missed)
            for name, one in zip(self.names, self.comparisons, strict=True)
            for missed in (one.gate_failed, one.speedup_missed)
            if missed
        ]


def names_of(bundles: Sequence[Bundle]) -> tuple[str, ...]:
    """Names to tell bundles apart by: those of their folders, or their whole paths where these are the same.

    Raises:
        UsageError: a bundle is given twice.
    """
    paths = [Path(bundle.path) for bundle in bundles]
    twice = next((path for at, path in enumerate(paths) if path in paths[:at]), None)
    if twice is not None:
        raise UsageError(f"{twice} is given twice.", do="Name each candidate once.")
    short = [path.name for path in paths]
    return tuple(short if len(set(short)) == len(short) else map(str, paths))


def compare_candidates(
    dense: Bundle,
    sparse: Sequence[Bundle],
    compare: Callable[[Bundle, Bundle], Comparison],
    *,
    runtime: str | None,
    on_progress: Callable[[str], None],
) -> Candidates:
    """Compare each candidate with the dense bundle, one after the other.

    Args:
        dense: what all are compared with.
        sparse: the candidates, two at least.
        compare: `compare` with everything but the bundles.
        runtime: that it was given; None for the best that opens both.
        on_progress: gets the name of each candidate before it is compared.

    Raises:
        UsageError: a candidate given twice, or candidates that would run on different runtimes.
    """
    names = names_of(sparse)
    best = {name: candidates(dense, one)[0] for name, one in zip(names, sparse, strict=True)}
    if runtime is None and len(set(best.values())) > 1:
        listed = ", ".join(f"{name} on {of}" for name, of in best.items())
        raise UsageError(
            f"The candidates would run on different runtimes: {listed}.",
            do="Give one that runs all of them, such as --runtime onnxruntime-cpu.",
        )
    found = []
    for name, one in zip(names, sparse, strict=True):
        on_progress(f"comparing {dense.path} with {name}")
        found.append(compare(dense, one))
    return Candidates(names=names, comparisons=tuple(found))


def check_gates(found: Candidates) -> None:
    """Check the requirements that were given: every candidate has to keep them.

    Raises:
        GateFailed: a candidate lost more than it may.
        SpeedupNotReached: a candidate is not as fast as required.
    """
    pairs = list(zip(found.names, found.comparisons, strict=True))
    lost = [f"{name}: {one.gate_failed}" for name, one in pairs if one.gate_failed]
    if lost:
        raise GateFailed(
            " ".join(lost),
            expected=f"A loss of at most {found.comparisons[0].max_drop} was allowed.",
            do="Drop these candidates, leave more of their layers dense, or allow a larger drop.",
        )
    slow = [f"{name}: {one.speedup_missed}" for name, one in pairs if one.speedup_missed]
    if slow:
        required = found.comparisons[0].required_speedup or 1.0
        raise speedup_not_reached(" ".join(slow), required, do="Read the verdicts for the reasons.")


def write_results(folder: Path, found: Candidates) -> Path:
    """Write `comparison.json` of all candidates, raw samples included, into a folder.

    Returns:
        Its path.

    Raises:
        OutputError: it cannot be written.
    """
    path = Path(folder) / RESULT_FILE
    write_json(path, found.document)
    return path
