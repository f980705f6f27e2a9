"""`gate`: the chain from a bundle's weights to its speed, one verdict and one exit code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from sparse_export import errors
from sparse_export.errors import SparseExportError, UnknownNameError, UsageError
from sparse_export.evaluate.bench import check_batches
from sparse_export.evaluate.compare import compare, require_possible_timing
from sparse_export.evaluate.comparison import Comparison
from sparse_export.evaluate.deciding import Round
from sparse_export.evaluate.links.case import Case
from sparse_export.evaluate.links.chain import Finding, Link, LinkResult, walk
from sparse_export.evaluate.links.files import (
    engines_are_of_the_graph,
    files_are_whole,
    graph_keeps_its_pattern,
)
from sparse_export.evaluate.links.junit import junit_xml
from sparse_export.evaluate.links.measured import score_is_kept, speed_is_reached
from sparse_export.evaluate.links.weights import weights_keep_their_pattern
from sparse_export.evaluate.validate import validate
from sparse_export.evaluate.validation import Validation
from sparse_export.files import write_bytes, write_json
from sparse_export.instruments.outcome import require_possible_speedup
from sparse_export.runtimes.choice import RUNTIMES, open_runtime
from sparse_export.tables import Shown, Table
from sparse_export.tasks.data.picture_settings import PictureSettings
from sparse_export.tasks.scores import MaxDrop, require_possible_drop
from sparse_export.trust import TrustedDigests, digests
from sparse_export.version import command_line, library_versions, now

__all__ = ["MAX_DROP_POINTS", "Gate", "check_gate", "gate", "write_results"]

RESULT_FILE = "gate.json"
JUNIT_FILE = "gate.junit.xml"
MAX_DROP_POINTS = 1.0
_BLOCK_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What became of every link, in their order.

    Attributes:
        passed: none is broken.
        validation, comparisons: behind the links of score and speed, None and () where they were not
            reached or not asked for; a comparison for each runtime that speed was measured on.
    """

    bundle: str
    against: str
    passed: bool
    verdict: str
    exit_code: int
    links: tuple[LinkResult, ...]
    validation: Validation | None
    comparisons: tuple[Comparison, ...]
    versions: dict[str, str]
    command: tuple[str, ...]
    created: str
    kind: str = "gate"
    schema_version: int = 1

    def shown(self) -> Shown:
        """A row for each link with what it found, and the verdict."""
        paths = Table(rows=[("bundle", self.bundle), ("against", self.against)])
        rows = []
        for link in self.links:
            broken = [f"BROKEN: {link.reason}"] if link.reason else []
            found = [f"- {text}" for text in (*link.told, *broken)]
            rows.append((link.name, link.outcome, "\n".join((link.asks, *found))))
        return Shown([paths, Table(head=("link", "outcome", "what has to hold"), rows=rows), self.verdict])

    def __str__(self) -> str:
        return self.shown().draw()


def gate(
    bundle: str | Path,
    against: str | Path,
    *,
    max_drop: MaxDrop = MAX_DROP_POINTS,
    require_speedup: float | None = None,
    batches: Sequence[int] = (1, 32),
    rounds: int = 40,
    budget_s: float = 120.0,
    block_s: float = _BLOCK_S,
    n_threads: int | None = None,
    seed: int = 0,
    data_dir: str | Path | None = None,
    inputs: str | Path | None = None,
    run: str | Path | None = None,
    runtimes: Sequence[str] | None = None,
    trust: TrustedDigests = None,
    task: str | None = None,
    data: str | None = None,
    pictures: PictureSettings | None = None,
    on_progress: Callable[[str], None] = lambda line: None,
    on_round: Round | None = None,
) -> Gate:
    """Hold a bundle to everything that deploying it rests on, link by link, up to the first that is broken.

    Its files are whole; its weights keep their pattern; so does its graph; its engines were built from that
    graph; its score, measured with those files, is at most max_drop worse than that of the dense bundle
    `against`; and where a speed-up is required, the interval of the interleaved comparison is
    above it, on each of `runtimes`, by default on the best that opens both bundles.

    Args:
        bundle: folder of the bundle to deploy.
        against: folder of the dense one.
        max_drop: how much worse the score may be, as `validate` takes it.
        require_speedup: what the lower end of the interval of dense / sparse has to reach; None measures no
            speed.
        batches: samples of a timed call.
        rounds: see `compare`, as for budget_s, block_s, n_threads and seed.
        data_dir: where the data sets lie.
        inputs: of a bundle without labels, whose agreement with the dense one is its score, real inputs to
            measure that on; None for the golden ones.
        run: where the run of the bundle is now, if not at its path in the manifest.
        runtimes: that have to run the bundle besides onnxruntime on the CPU, None for those of its engines
            that work here.
        trust: SHA-256 of manifests and a `run.json`, as `validate` takes it.
        task: what it is scored for, as `validate` takes it.
        data: what it is scored on, as `validate` takes it.
        pictures: likewise.
        on_progress: called with a line before each link.
        on_round: told of each round that is timed.

    Returns:
        What became of every link; a broken one is in it, for `check_gate` to raise.

    Raises:
        UsageError: options without meaning.
    """
    require_possible_drop(max_drop)
    require_possible_speedup(require_speedup, example="Write 1.2 for a fifth more speed.")
    check_batches(batches)
    require_possible_timing(rounds, budget_s, block_s)
    for name in runtimes or ():
        if name not in RUNTIMES:
            raise UnknownNameError("runtime", name, RUNTIMES)
    case = Case(
        bundle_path=Path(bundle),
        against_path=Path(against),
        max_drop=max_drop,
        require_speedup=require_speedup,
        batches=tuple(batches),
        rounds=rounds,
        n_threads=n_threads,
        seed=seed,
        data_dir=None if data_dir is None else Path(data_dir),
        inputs=None if inputs is None else Path(inputs),
        run=None if run is None else Path(run),
        runtimes=None if runtimes is None else tuple(runtimes),
        trust=trust,
        task=task,
        data=data,
        pictures=pictures,
    )
    measured = _Measured(case, budget_s, block_s, on_round)
    links = (
        Link(name="files", asks="the files are unchanged", check=partial(files_are_whole, case)),
        Link(
            name="weights",
            asks="the stored weights keep their pattern",
            check=partial(weights_keep_their_pattern, case),
        ),
        Link(name="graph", asks="the graph keeps the pattern", check=partial(graph_keeps_its_pattern, case)),
        Link(
            name="engines",
            asks="each engine was built from this graph",
            check=partial(engines_are_of_the_graph, case),
        ),
        Link(
            name="score",
            asks="the score is that of training and of the dense network",
            check=measured.score,
        ),
        Link(name="speed", asks="the promised speed-up is reached", check=measured.speed),
    )
    results = walk(links, report=on_progress)
    broken = next((one for one in results if one.outcome == "broken"), None)
    return Gate(
        bundle=str(case.bundle_path),
        against=str(case.against_path),
        passed=broken is None,
        verdict=_verdict(results, measured.not_run, measured.not_timed),
        exit_code=0 if broken is None else broken.exit_code,
        links=results,
        validation=measured.validation,
        comparisons=tuple(measured.comparisons),
        versions=library_versions(),
        command=command_line(),
        created=now(),
    )


class _Measured:
    """Owns what the two links that run the files measured, so that it can be written with the verdict."""

    def __init__(self, case: Case, budget_s: float, block_s: float, on_round: Round | None) -> None:
        self.validation: Validation | None = None
        self.comparisons: list[Comparison] = []
        self._case = case
        self._budget_s, self._block_s, self._on_round = budget_s, block_s, on_round

    @property
    def not_run(self) -> tuple[str, ...]:
        """Runtimes that the bundle was built for, and whose score is not known here."""
        return () if self.validation is None else tuple(self.validation.not_run)

    @property
    def not_timed(self) -> tuple[str, ...]:
        """Engines of the bundle that speed was promised of and not measured on."""
        if self._case.require_speedup is None or not self.comparisons:
            return ()
        timed = {one.runtime for one in self.comparisons}
        engines = dict.fromkeys(engine.target for engine in self._case.bundle.info.engines)
        return tuple(name for name in engines if name not in timed)

    def score(self) -> Finding:
        case = self._case
        case.forget_graph()  # networks are loaded now, and no later link looks at it
        self.validation = validate(
            case.bundle,
            data_dir=case.data_dir,
            run=case.run,
            against=case.against_path,
            inputs=case.inputs,
            n_threads=case.n_threads,
            runtimes=case.runtimes,
            trust=case.trust,
            task=case.task,
            data=case.data,
            pictures=case.pictures,
        )
        return score_is_kept(case, self.validation)

    def speed(self) -> Finding:
        case = self._case
        if case.require_speedup is None:
            return Finding(told=("no speed-up was promised, so none was measured",), checked=False)
        # All of them before anything is timed, so that one that is missing hides no speed that was missed.
        for named in case.runtimes or ():
            for side in (case.dense, case.bundle):
                open_runtime(side, named, n_threads=case.n_threads, trust=digests(case.trust)).close()
        for runtime in case.runtimes or (None,):
            self.comparisons.append(
                compare(
                    case.dense,
                    case.bundle,
                    batches=case.batches,
                    rounds=case.rounds,
                    budget_s=self._budget_s,
                    block_s=self._block_s,
                    n_threads=case.n_threads,
                    seed=case.seed,
                    require_speedup=case.require_speedup,
                    runtime=runtime,
                    trust=digests(case.trust),
                    on_round=self._on_round,
                )
            )
        return speed_is_reached(case, self.comparisons)


def _verdict(
    links: Sequence[LinkResult], runtimes_not_run: Sequence[str], runtimes_not_timed: Sequence[str]
) -> str:
    kept = [link.name for link in links if link.outcome == "kept"]
    idle = [link.name for link in links if link.outcome == "nothing to check"]
    behind = [link.name for link in links if link.outcome == "not run"]
    parts = []
    broken = next((link for link in links if link.outcome == "broken"), None)
    if broken is not None:
        parts.append(f"NOT PASSED: the link {broken.name!r} is broken. {broken.reason}")
    else:
        parts.append("PASSED.")
    for names, what in (
        (kept, "Kept"),
        (idle, "Nothing to check"),
        (behind, "Not run"),
    ):
        if names:
            parts.append(f"{what}: {', '.join(names)}.")
    if runtimes_not_run:
        parts.append(f"Not run here, so not vouched for: {', '.join(runtimes_not_run)}.")
    if runtimes_not_timed:
        parts.append(f"The speed is not that of its engines: not timed on {', '.join(runtimes_not_timed)}.")
    return " ".join(parts)


def check_gate(found: Gate) -> None:
    """Check that no link is broken.

    Raises:
        SparseExportError: what broke the first link that is, by its class and with its exit code.
    """
    for link in found.links:
        if link.outcome == "broken":
            kind = getattr(errors, link.error or "", SparseExportError)
            if kind is UnknownNameError:  # is made of a name, not of a sentence
                kind = UsageError
            raise kind(f"The link {link.name!r} is broken: {link.reason}")


def write_results(folder: str | Path, found: Gate) -> tuple[Path, Path]:
    """Write `gate.json`, raw samples included, and `gate.junit.xml` into a folder, which is made when absent.

    Returns:
        Their paths.

    Raises:
        OutputError: one cannot be written.
    """
    paths = Path(folder) / RESULT_FILE, Path(folder) / JUNIT_FILE
    write_json(paths[0], asdict(found))
    write_bytes(paths[1], junit_xml(found.bundle, found.links, found.created))
    return paths
