"""Work in a process of its own: what goes in, what comes out, and what a crash leaves."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from sparse_export import child
from sparse_export.errors import ArtefactError, MissingCapability, UsageError

WORKER = """
import os, sys, time
from pathlib import Path
from sparse_export.child import answer
from sparse_export.errors import UsageError

def work(request):
    match request["do"]:
        case "double":
            return 2 * request["x"]
        case "read":
            return Path(request["name"]).read_text()
        case "refuse":
            raise UsageError("x is 3.", expected="2.", do="Give 2.")
        case "crash":
            print("last words", file=sys.stderr, flush=True)
            os.abort()
        case "leave":
            sys.exit(0)
        case "sleep":
            time.sleep(60)

sys.exit(answer(sys.argv[1:], work))
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_worker.py").write_text(WORKER)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_worker"


def test_a_request_is_answered(worker: str) -> None:
    assert child.call(worker, {"do": "double", "x": 21}, limit_s=60) == 42


def test_files_lie_in_the_folder_of_the_worker(worker: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("found")
    found = child.call(worker, {"do": "read", "name": "a"}, limit_s=60, links={"a": tmp_path / "text"})
    assert found == "found"


def test_an_error_of_ours_comes_back_with_all_its_parts(worker: str) -> None:
    with pytest.raises(child.ChildError) as caught:
        child.call(worker, {"do": "refuse"}, limit_s=60)
    error = caught.value.as_one_of(UsageError, otherwise=ArtefactError)
    assert (type(error), error.what, error.expected, error.do) == (UsageError, "x is 3.", "2.", "Give 2.")
    assert type(caught.value.as_one_of(MissingCapability, otherwise=ArtefactError)) is ArtefactError


@pytest.mark.parametrize(
    ("what", "limit_s", "how", "returncode"),
    [
        ("crash", 60, "was ended by SIGABRT: last words", -6),
        ("leave", 60, "ended without a result", 0),
        ("sleep", 0.5, "was not done after 0.5 s", None),
    ],
)
def test_a_process_without_a_result_is_told_with_its_end(
    worker: str, what: str, limit_s: float, how: str, returncode: int | None
) -> None:
    with pytest.raises(child.ChildFailed) as caught:
        child.call(worker, {"do": what}, limit_s=limit_s)
    assert caught.value.how.startswith(how)
    assert caught.value.returncode == returncode


def test_a_child_finds_every_module_where_this_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/of/the/user")
    paths = child.environment()["PYTHONPATH"].split(os.pathsep)
    assert paths[0] == "/of/the/user"
    assert paths[1] == str(Path(child.__file__).resolve().parents[1])
    assert {path for path in sys.path if path} <= set(paths)
