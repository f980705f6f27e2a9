"""A chain of checks that ends at the first one that does not hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sparse_export.errors import SparseExportError, UsageError

__all__ = ["Figure", "Finding", "Link", "LinkResult", "Outcome", "walk"]

Figure = int | float | str
Outcome = Literal["kept", "broken", "nothing to check", "not run"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check found.

    Attributes:
        told: sentences for people.
        figures: by name, with the unit in it.
        problem: what breaks the link, None when it holds.
        checked: False where there was nothing to hold it to.
    """

    told: tuple[str, ...]
    figures: dict[str, Figure] = field(default_factory=dict)
    problem: SparseExportError | None = None
    checked: bool = True


@dataclass(frozen=True, kw_only=True)
class Link:
    """One thing that has to hold.

    Attributes:
        name: a word.
        asks: what has to hold, as a sentence.
        check: may raise what breaks the link.
    """

    name: str
    asks: str
    check: Callable[[], Finding]


@dataclass(frozen=True, kw_only=True)
class LinkResult:
    """What became of a link.

    Attributes:
        told, figures: as the check found them, empty for one that was not run.
        reason: what broke it, with what was expected and what to do.
        error, exit_code: class of that error and the code that a program ends with, None and 0 for a link
            that holds.
        duration_s: wall time.
    """

    name: str
    asks: str
    outcome: Outcome
    told: tuple[str, ...] = ()
    figures: dict[str, Figure] = field(default_factory=dict)
    reason: str | None = None
    error: str | None = None
    exit_code: int = 0
    duration_s: float = 0.0


def walk(
    links: Sequence[Link],
    *,
    report: Callable[[str], None] = lambda line: None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[LinkResult, ...]:
    """Check one link after the other; those behind the first that is broken are not run.

    Args:
        report: called with a line before each link.
        clock: seconds.

    Raises:
        UsageError: of the first check, before anything was found out. From the second one on it breaks the
            link, so that what was found out by then is written.
    """
    results: list[LinkResult] = []
    for link in links:
        if any(one.outcome == "broken" for one in results):
            results.append(LinkResult(name=link.name, asks=link.asks, outcome="not run"))
            continue
        report(f"checking {link.name}: {link.asks}")
        start = clock()
        try:
            found = link.check()
        except SparseExportError as cause:
            if isinstance(cause, UsageError) and not results:
                raise
            found = Finding(told=(), problem=cause)
        results.append(_result(link, found, clock() - start))
    return tuple(results)


def _result(link: Link, found: Finding, duration_s: float) -> LinkResult:
    problem = found.problem
    outcome: Outcome = "kept" if found.checked else "nothing to check"
    return LinkResult(
        name=link.name,
        asks=link.asks,
        outcome=outcome if problem is None else "broken",
        told=found.told,
        figures=found.figures,
        reason=None if problem is None else str(problem),
        error=None if problem is None else type(problem).__name__,
        exit_code=0 if problem is None else problem.exit_code,
        duration_s=duration_s,
    )
