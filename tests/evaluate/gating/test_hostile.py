"""A bundle from elsewhere whose ONNX file ends whatever process runs it: an error of every command, and no
more.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sparse_export import child
from sparse_export.errors import ArtefactError
from sparse_export.evaluate.bench import bench
from sparse_export.evaluate.compare import compare
from sparse_export.evaluate.gate import gate, write_results
from sparse_export.evaluate.validate import validate
from sparse_export.files import sha256_file
from sparse_export.formats.bundle import Bundle
from tests.evaluate.gating.conftest import QUICK, Spoil
from tests.evaluate.gating.test_gate import broken_at
from tests.graph.dividing import with_division

Leave = Callable[[], None]


@pytest.fixture
def leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Leave:
    """Become another user, who vouched for nothing yet."""

    def leave() -> None:
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "somebody-else"))

    return leave


@pytest.fixture
def hostile(spoil: Spoil, leave: Leave) -> Path:
    """A bundle whose graph divides the smallest int64 by -1, from somebody else."""
    folder = spoil(lambda model: with_division(model, -1))
    leave()
    return folder


USES: dict[str, Callable[[Path, Path], object]] = {
    "validate": lambda hostile, dense: validate(hostile, n_threads=1),
    "validate, as the dense one": lambda hostile, dense: validate(dense, against=hostile, n_threads=1),
    "bench": lambda hostile, dense: bench(hostile, **QUICK),
    "compare": lambda hostile, dense: compare(dense, hostile, **QUICK),
}


@pytest.mark.parametrize("use", USES)
def test_what_ends_a_process_ends_none_that_matters(use: str, hostile: Path, dense: Bundle) -> None:
    with pytest.raises(ArtefactError, match=r"model\.onnx comes from elsewhere.* was ended by SIGFPE"):
        USES[use](hostile, dense.path)


def test_the_gate_names_the_link_that_it_breaks(hostile: Path, dense: Bundle, tmp_path: Path) -> None:
    found = gate(hostile, dense.path, n_threads=1)
    assert "was ended by SIGFPE" in broken_at(found, "graph", 6)
    (error,) = ElementTree.parse(write_results(tmp_path, found)[1]).getroot().iter("error")
    assert error.get("type") == "ArtefactError"


def test_the_program_ends_with_6_and_its_reports(hostile: Path, dense: Bundle, tmp_path: Path) -> None:
    """In a process of its own, which would be gone if it opened the file itself."""
    out = tmp_path / "out"
    words = [
        "gate",
        str(hostile),
        "--against",
        str(dense.path),
        "--threads",
        "1",
        "--out",
        str(out),
        "--json",
    ]
    ended = subprocess.run(
        [sys.executable, "-m", "sparse_export", *words],
        env=child.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 6, ended.stderr
    assert "SIGFPE" in ended.stderr
    assert json.loads(ended.stdout)["exit_code"] == 6
    assert {path.name for path in out.iterdir()} == {"gate.json", "gate.junit.xml"}


def test_a_division_by_zero_in_a_file_of_ones_own_breaks_the_graph(
    spoil: Spoil, dense: Bundle, tmp_path: Path
) -> None:
    """No other process tries it; onnxruntime raises, and the gate has something to write."""
    found = gate(spoil(lambda model: with_division(model, 0)), dense.path, n_threads=1)
    assert "division by zero" in broken_at(found, "graph", 6).lower()
    document = json.loads(write_results(tmp_path, found)[0].read_bytes())
    assert document["links"][2]["error"] == "ArtefactError"


def test_an_honest_bundle_from_elsewhere_passes(copied: Path, dense: Bundle, leave: Leave) -> None:
    leave()
    assert gate(copied, dense.path, n_threads=1).passed


def test_two_digests_vouch_for_two_bundles(
    copied: Path, dense: Bundle, leave: Leave, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave()

    def probed(*_: object, **__: object) -> None:
        raise AssertionError("it was probed in spite of --trust")

    monkeypatch.setattr("sparse_export.runtimes.probe._probe", probed)
    digests = [sha256_file(folder / "manifest.json") for folder in (copied, dense.path)]
    assert gate(copied, dense.path, n_threads=1, trust=digests).passed
