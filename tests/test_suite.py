"""How the suite is run in parts, and how what they report is added up."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import many
from tests.conftest import PARTS, unit_of

CHECKOUT = Path(__file__).resolve().parent.parent
SCRIPT = CHECKOUT / ".ci" / "suite.py"

PASSED = '<testcase classname="a" name="{}"/>'
FAILED = '<testcase classname="a" name="{}"><failure message="no"/></testcase>'
BROKEN = '<testcase classname="a" name="{}"><error message="failed on setup"/></testcase>'
SKIPPED = '<testcase classname="a" name="{}"><skipped message="no card"/></testcase>'


@pytest.fixture(scope="module")
def suite() -> ModuleType:
    spec = importlib.util.spec_from_file_location("suite", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def left(folder: Path, part: str, code: int, *cases: str) -> None:
    """What one call leaves in the folder of reports."""
    (folder / f"{part}.exit").write_text(f"{code}\n")
    body = "".join(case.format(f"test_{n}") for n, case in enumerate(cases))
    (folder / f"{part}.xml").write_text(f"<testsuites><testsuite>{body}</testsuite></testsuites>")


def summed(suite: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    return suite.main(["sum", str(folder)]), capsys.readouterr().out.splitlines()


def test_the_last_line_adds_up_all_calls(
    suite: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left(tmp_path, "every-day", 0, PASSED, PASSED, SKIPPED)
    left(tmp_path, "timing", 0, PASSED)
    left(tmp_path, "full-timing", 5)
    assert summed(suite, tmp_path, capsys) == (0, ["3 passed, 0 failed, 1 skipped"])


def test_failures_and_errors_of_any_call_count_as_failed(
    suite: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left(tmp_path, "every-day", 1, PASSED, FAILED, BROKEN)
    left(tmp_path, "timing", 0, PASSED)
    assert summed(suite, tmp_path, capsys) == (1, ["2 passed, 2 failed, 0 skipped"])


def test_a_test_that_failed_and_could_not_end_is_one_test(
    suite: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left(tmp_path, "every-day", 1, PASSED, FAILED.format("same"), BROKEN.format("same"))
    assert summed(suite, tmp_path, capsys) == (1, ["1 passed, 1 failed, 0 skipped"])


@pytest.mark.parametrize("code", [-9, 2, 3])
def test_a_call_that_ended_before_its_tests_did_is_a_failure(
    code: int, suite: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left(tmp_path, "every-day", code, PASSED)
    found, lines = summed(suite, tmp_path, capsys)
    assert (found, lines[-1]) == (1, "1 passed, 1 failed, 0 skipped")
    assert lines[0] == f"every-day: pytest ended with {code}, though no test failed"


@pytest.mark.parametrize("code", [0, -11])
def test_a_call_without_a_whole_report_is_a_failure(
    code: int, suite: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left(tmp_path, "timing", 0, PASSED)
    left(tmp_path, "every-day", code)
    (tmp_path / "every-day.xml").write_text("<testsuites>")
    found, lines = summed(suite, tmp_path, capsys)
    assert (found, lines[-1]) == (1, "1 passed, 1 failed, 0 skipped")
    assert "left no report" in lines[0]


def test_no_call_at_all_is_a_failure(
    suite: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert summed(suite, tmp_path, capsys) == (1, ["No test passed.", "0 passed, 0 failed, 0 skipped"])


@pytest.mark.parametrize(
    ("codes", "wanted"),
    [((0, 0), 0), ((0, 5), 0), ((5, 5), 5), ((1, 0), 1), ((0, 2), 2), ((3, 1), 3), ((1, 5), 1)],
)
def test_every_part_runs_and_the_first_failure_is_the_exit_code(
    codes: tuple[int, int], wanted: int, suite: ModuleType, tmp_path: Path
) -> None:
    """5 is pytest's code for no test: arguments may leave a part without one."""
    called: list[list[str]] = []
    answers = iter(codes)

    def call(command: list[str], *, env: dict[str, str]) -> int:
        called.append(command)
        return next(answers)

    assert suite.run("test", ["-k", "a or b"], tmp_path, call) == wanted
    assert [words[-2:] for words in called] == [["-k", "a or b"]] * 2
    assert ["-n" in words for words in called] == [True, False]  # what is timed is alone


@pytest.mark.parametrize(
    ("code", "sum_up"), [(0, "3 passed, 0 failed, 0 skipped"), (1, "2 passed, 1 failed, 0 skipped")]
)
def test_ci_runs_the_long_tests_in_any_case_and_ends_with_the_sum(
    code: int, sum_up: str, tmp_path: Path
) -> None:
    """Everything but the script itself and the sum is played."""
    for folder in (".ci", ".venv/bin", "played"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("run", "suite.py"):
        shutil.copy(SCRIPT.with_name(name), tmp_path / ".ci" / name)
    left(tmp_path / "played", "every-day", code, FAILED if code else PASSED, PASSED)
    left(tmp_path / "played", "full", 0, PASSED)
    played = {
        ".venv/bin/python": f'[ "$1" = -m ] || exec {sys.executable} "$@"',
        "played/chromium": "",
        "played/make": f"""
            case "$2" in
            test) cp played/every-day.* "$TEST_REPORTS"; exit {code} ;;
            test-full) cp played/full.* "$TEST_REPORTS" ;;
            esac""",
    }
    for name, text in played.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path / 'played'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [tmp_path / ".ci" / "run"],
        env=os.environ | {"PATH": path},
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.splitlines()[-1]) == (code, sum_up), done.stderr


def test_the_parts_hold_every_test_and_none_twice_but_those_with_many_examples(suite: ModuleType) -> None:
    assert {part for parts in suite.PARTS.values() for part in parts} == set(PARTS)
    for marks in ({"full"}, {"timing"}, {"full", "timing"}, {"slow"}, {"gpu", "full"}, set[str]()):
        assert sum(is_in(marks) for is_in in PARTS.values()) == 1
    assert [part for part, is_in in PARTS.items() if is_in({"many"})] == ["every-day", "full"]


def test_tests_that_share_what_took_long_to_make_stay_in_one_worker() -> None:
    assert unit_of("tests/serving/test_load.py::test_a[x::y]") == "tests/serving/"
    assert unit_of("tests/graph/test_export.py::test_a[x::y]") == "tests/graph/test_export.py"


def test_the_parts_for_every_day_run_as_make_runs_them(suite: ModuleType, tmp_path: Path) -> None:
    """In a checkout with this suite's conftest, and tests of every kind."""
    (tmp_path / "tests").mkdir()
    for name in ("pyproject.toml", "tests/__init__.py", "tests/conftest.py", "tests/many.py"):
        (tmp_path / name).write_bytes((CHECKOUT / name).read_bytes())
    (tmp_path / "tests" / "test_all_kinds.py").write_text(
        "import os, pytest\nfrom hypothesis import given, strategies as st\nfrom tests.many import many\n"
        "def test_threads():\n    assert os.environ['OMP_NUM_THREADS'] == '1'\n"
        "@pytest.mark.timing\ndef test_timed():\n    assert {'PYTEST_XDIST_WORKER', "
        "'OMP_NUM_THREADS'}.isdisjoint(os.environ)\n"
        "@pytest.mark.full\ndef test_long():\n    assert False\n"
        "examples = []\n@many(7, every_day=3, database=None)\n@given(st.integers())\n"
        "def test_property(n):\n    examples.append(n)\n"
        "def test_number():\n    assert len(examples) == 3\n"
    )
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "OMP_"))
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "test", "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env=environment | {"TEST_REPORTS": str(tmp_path / "reports")},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert suite.add_up(tmp_path / "reports") == ([], (4, 0, 0), True)


def test_examples_are_drawn_as_the_environment_says() -> None:
    """Whatever rooms were read before: no folder has a profile of its own."""
    profile = hypothesis.settings.get_current_profile_name()
    assert profile == ("repeatable" if os.environ.get("CI") else "here")


def test_all_examples_are_tried_where_no_part_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    for part, n in (("every-day", 3), ("full", 7), (None, 7)):
        monkeypatch.setattr(many, "part", part)
        seen.clear()

        @many.many(7, every_day=3, database=None)
        @given(st.integers())
        def look(value: int) -> None:
            seen.append(value)

        look()
        assert len(seen) == n
