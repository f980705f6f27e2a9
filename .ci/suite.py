"""Runs the test suite, each part in a pytest of its own, and adds up what the parts reported.

    python .ci/suite.py test [PYTEST_ARGS ...]        the tests for every day
    python .ci/suite.py test-full [PYTEST_ARGS ...]   the long ones
    python .ci/suite.py sum FOLDER                    one line for all the calls before

With TEST_REPORTS=FOLDER in the environment every call leaves its report there, for `sum`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

NOTHING_MATCHED = 5  # pytest's exit code

# What is in a part, tests/conftest.py says. What is timed runs when nothing else does.
TWO_AT_ONCE = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
PARTS = {
    "test": {"every-day": TWO_AT_ONCE, "timing": ()},
    "test-full": {"full": TWO_AT_ONCE, "full-timing": ()},
}
# Of two workers on two cores each has one: torch's second threads would only wait for each other. A third
# worker made it no faster.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


class Counts(NamedTuple):
    """How many tests of one call ended how; an error in a fixture counts as failed."""

    passed: int
    failed: int
    skipped: int


def counts_of(report: Path) -> Counts:
    """Read a JUnit report of pytest.

    Raises:
        OSError: there is no report.
        ElementTree.ParseError: it is not whole.
    """
    # A test that failed and whose fixture failed to end stands there twice.
    worst: dict[tuple[str | None, str | None], str] = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        ends = {part.tag for part in case}
        end = next((tag for tag in ("failure", "error", "skipped") if tag in ends), "passed")
        key = case.get("classname"), case.get("name")
        if worst.get(key) not in ("failure", "error"):
            worst[key] = end
    ends_of = list(worst.values())
    return Counts(
        passed=ends_of.count("passed"),
        failed=ends_of.count("failure") + ends_of.count("error"),
        skipped=ends_of.count("skipped"),
    )


def run(target: str, words: Sequence[str], reports: Path, call: Callable[..., int] = subprocess.call) -> int:
    """Run all parts of a target, whatever becomes of each.

    Args:
        target: A key of `PARTS`.
        words: Further arguments for pytest, for each part.
        reports: The folder for the reports; `add_up` reads them.
        call: Runs a command in the environment `env` and returns its exit code.

    Returns:
        The exit code: that of the first part that failed. A part that `words` leave without a test did not
            fail,
        unless none has any.
    """
    codes = []
    for part, options in PARTS[target].items():
        report = reports / f"{part}.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            f"--part={part}",
            *options,
            f"--junit-xml={report}",
            *words,
        ]
        environment = {**(ONE_THREAD if options else {}), **os.environ}
        codes.append(call(command, env=environment))
        (reports / f"{part}.exit").write_text(f"{codes[-1]}\n")
    failed = [code for code in codes if code not in (0, NOTHING_MATCHED)]
    return failed[0] if failed else min(codes)


def add_up(reports: Path) -> tuple[list[str], Counts, bool]:
    """Add up what the calls of `run` left in a folder.

    Returns:
        What is wrong with a report, the sum of all, and whether all calls passed. A call that ended with an
        error of which its report has no test adds one to the failed.
    """
    problems, total, ok = [], Counts(0, 0, 0), True
    for file in sorted(reports.glob("*.exit")):
        code = int(file.read_text())
        report = file.with_suffix(".xml")
        try:
            counts = counts_of(report)
        except (OSError, ET.ParseError) as error:
            counts = Counts(0, 0, 0)
            problems.append(f"{file.stem}: pytest ended with {code} and left no report: {error}")
            code = code or 1
        failed_unseen = code not in (0, NOTHING_MATCHED) and not counts.failed
        if failed_unseen:
            problems.append(f"{file.stem}: pytest ended with {code}, though no test failed")
            counts = counts._replace(failed=1)
        ok = ok and code in (0, NOTHING_MATCHED) and not counts.failed
        total = Counts(*(a + b for a, b in zip(total, counts, strict=True)))
    if not total.passed:
        problems.append("No test passed.")
        ok = False
    return problems, total, ok


def main(words: list[str]) -> int:
    if words[:1] == ["sum"] and len(words) == 2:
        problems, total, ok = add_up(Path(words[1]))
        for problem in problems:
            print(problem)
        print(f"{total.passed} passed, {total.failed} failed, {total.skipped} skipped", flush=True)
        return 0 if ok else 1
    if not words or words[0] not in PARTS:
        print(__doc__, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        reports = Path(os.environ.get("TEST_REPORTS") or folder)
        reports.mkdir(parents=True, exist_ok=True)
        return run(words[0], words[1:], reports)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
