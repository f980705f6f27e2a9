"""The program for a day with a card, rehearsed without one."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_session
from benchmarks.gpu.parts import PARTS, run_part
from benchmarks.gpu.setting import REHEARSAL


@pytest.mark.parametrize("part", list(PARTS))
def test_every_part_runs_to_its_end_on_the_reference(part: str, tmp_path: Path) -> None:
    file = tmp_path / "part.json"
    run_part(part, REHEARSAL, file)
    document = json.loads(file.read_text())
    assert document["cases"]
    for case in document["cases"]:
        for name, samples in (case.get("samples_ms") or {}).items() if part != "ceilings" else ():
            assert len(samples) == 20, name
        difference = case.get("relative_difference", 0.0)
        for value in difference.values() if isinstance(difference, dict) else (difference,):
            assert value < 1e-5


def test_shares_of_the_time_are_for_the_parts_there_are() -> None:
    assert set(gpu_session.SHARES) == {"tests", *PARTS}
    assert sum(gpu_session.SHARES.values()) == pytest.approx(1.0)


def test_a_session_writes_a_document_a_table_and_the_samples_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        name = words[words.index("--part") + 1]
        if name == "training":
            raise subprocess.TimeoutExpired(words, 1.0)
        file = Path(words[words.index("--part-file") + 1])
        ratio = {"estimate": 1.3, "low": 1.2, "high": 1.4}
        cases = [{"size": 4, "dense / sparse": ratio, "floor": 1.01, "samples_ms": {"dense": [1.0]}}]
        file.write_text(json.dumps({"cases": cases, "throttled": [], "cards_why_empty": None}))
        return subprocess.CompletedProcess(words, 1 if name == "masks" else 0, "", "it broke")

    monkeypatch.setattr(subprocess, "run", run)
    written = gpu_session.session(tmp_path, ["products", "training", "masks"], 1.0, rehearse=True)
    document = json.loads(written.read_text())
    assert "mean nothing" in document["note"]
    assert document["parts"]["products"]["problem"] is None
    assert "stopped after" in document["parts"]["training"]["problem"]
    assert document["parts"]["masks"]["problem"] == "it broke"
    assert "samples_ms" not in written.read_text()
    place = document["parts"]["masks"]["cases"][0]["samples"]
    with gzip.open(written.with_name(f"{written.stem}-samples.json.gz"), "rt") as stream:
        assert json.load(stream)[place] == {"dense": [1.0]}
    table = written.with_suffix(".md").read_text()
    assert "| products | size 4: dense / sparse | 1.300 | [1.200, 1.400] | 1.010 |" in table
    assert len(list(tmp_path.iterdir())) == 3


def test_without_a_card_nothing_is_measured() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a card")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_session"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parent.parent,
    )
    assert (done.returncode, "no CUDA device" in done.stderr) == (5, True)
