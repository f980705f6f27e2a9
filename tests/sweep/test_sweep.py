"""Sweeps: every cell once, whatever interrupts them; and what the table and the page say."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_export.errors import MissingCapability, SparseExportError
from sparse_export.files import write_json
from sparse_export.sweep import run_list
from sparse_export.sweep.earlier import complete_recipe, complete_runs
from sparse_export.sweep.grid import load_grid
from sparse_export.sweep.run_list import Cell
from sparse_export.sweep.run_worker import main
from sparse_export.sweep.running import run_of
from sparse_export.sweep.sweep import sweep
from sparse_export.sweep.table import shown
from sparse_export.train.recipe import Recipe, load_recipe
from tests.making_runs import network_and_masks, save_run
from tests.sealing import write_sealed

CHECKOUT = Path(__file__).parents[2]
GRID = (
    'recipe = "digits"\nmethods = ["dense", "set"]\ndensities = [0.1]\nseeds = [0, 1]\nchanges = { epochs = 2 }\n'
    '[vary]\n"sparsity.prune_rate" = [0.3]\n'
)


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag in ("script", "link", "iframe"):
            self.found.append(tag)


def test_a_stopped_sweep_goes_on_and_trains_nothing_twice(tmp_path: Path) -> None:
    """The program itself, stopped by SIGINT within a cell; then the same command again, and once more."""
    grid, out = tmp_path / "grid.toml", tmp_path / "out"
    grid.write_text(GRID)
    command = [sys.executable, "-m", "sparse_export", "sweep", str(grid), "--out", str(out), "--jobs", "1"]
    command += ["--device", "cpu", "--json"]
    first = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(out.glob("runs/*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 130
    assert json.loads(said)["error"]["type"] == "Interrupted"
    done = [run for run in out.glob("runs/*") if complete_recipe(run) is not None]
    assert len(done) < 4

    result = sweep(grid, out, n_jobs=2, device="cpu")
    assert [finding.status for finding in result.findings] == ["complete"] * 4
    stamps = {file: file.stat().st_mtime_ns for file in out.glob("runs/*/model.safetensors")}
    assert len(stamps) == 4
    text: list[str] = []
    again = sweep(grid, out, n_jobs=2, device="cpu", say=text.append)
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps
    assert "4 of 4 runs are complete already" in text
    assert again.rows == result.rows

    document = json.loads((out / "results.json").read_text())
    assert [row["method"] for row in document["rows"]] == ["dense", "set"]
    for row, finding_pair in zip(document["rows"], (document["runs"][:2], document["runs"][2:]), strict=True):
        values = [run["test_percent"] for run in finding_pair]
        assert row["test"]["mean"] == pytest.approx(sum(values) / 2)
        # Student's t with one degree of freedom at 97.5 % is 12.706.
        assert row["test"]["half_width"] == pytest.approx(12.7062 * abs(values[0] - values[1]) / 2, rel=1e-4)
        assert all(run["speed"]["step_ms"] > 0 for run in finding_pair)
    sparse = document["rows"][1]
    assert sparse["estimate_macs"] > 1.5
    assert sparse["estimate_macs"] > sparse["estimate_channels"] >= 1
    assert "set 0.1, prune_rate 0.3" in shown(result.rows).draw()

    page = (out / "report.html").read_text()
    links = _Links()
    links.feed(page)
    assert links.found == []
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    # Accuracy against density and against multiply-adds, the one varied key, the one sparse method's layers.
    assert len(drawings) == 4
    for drawing in drawings:
        ET.fromstring(drawing)
    assert "dense" in drawings[0]


def test_cells_that_fail_are_told_with_their_reasons_and_the_others_are_kept(tmp_path: Path) -> None:
    """One after the other: a density of no weight at all, a damaged run, and one that is well."""
    grid, out = tmp_path / "grid.toml", tmp_path / "out"
    grid.write_text(
        'recipe = "digits"\nmethods = ["static", "dsr", "set"]\ndensities = [0.1]\n'
        "changes = { epochs = 1 }\n[method.static]\ndensities = [1e-6]\n"
    )
    damaged = out / "runs" / run_list.cells_of(load_grid(grid))[1].name / "run.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{")
    with pytest.raises(SparseExportError, match=r"2 of 3 runs failed. One of them, static") as caught:
        sweep(grid, out, n_jobs=1, device="cpu")
    assert caught.value.exit_code == 1
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert [run["status"] for run in runs] == ["failed", "failed", "complete"]
    for run, said in zip(runs[:2], ("is none at all", "run.json"), strict=True):
        assert said in run["reason"]
        assert said in (out / "report.html").read_text()
    assert "Runs that failed" in (out / "report.html").read_text()


def test_what_every_cell_would_fail_by_is_told_after_the_first(tmp_path: Path) -> None:
    grid = tmp_path / "grid.toml"
    grid.write_text(
        'recipe = "mnist-lenet300-100"\nmethods = ["static"]\ndensities = [0.1]\nseeds = [0, 1, 2]\n'
    )
    with pytest.raises(MissingCapability, match=r"1 of 3 runs failed.*Data set mnist is not there"):
        sweep(grid, tmp_path / "out", n_jobs=1, data_dir=tmp_path / "nowhere", device="cpu")
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["status"] for run in document["runs"]] == ["failed", "waiting", "waiting"]


def made_run(folder: Path, recipe: Recipe, **changes: Any) -> Path:
    """A run as training by this recipe leaves it, untrained."""
    module, masks = network_and_masks(density=0.1)
    run = save_run(folder, module, masks, recipe=recipe.model_dump(mode="json"), **changes)
    return run.path


def only_cell(tmp_path: Path) -> tuple[Path, Cell]:
    grid = tmp_path / "grid.toml"
    grid.write_text('recipe = "digits"\nmethods = ["static"]\ndensities = [0.1]\nchanges = { epochs = 1 }\n')
    (cell,) = run_list.cells_of(load_grid(grid))
    return grid, cell


def test_a_complete_run_of_an_earlier_version_stands_for_its_cell_under_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier version called the folder otherwise, and its recipes lacked keys that have their defaults
    now.
    """
    (grid, cell), out = only_cell(tmp_path), tmp_path / "out"
    run = made_run(out / "runs" / "static-0.1-seed0-0123456789", cell.recipe)
    record = json.loads((run / "run.json").read_text())
    del record["recipe"]["label_smoothing"], record["recipe"]["sparsity"]["transposable"]
    write_sealed(run / "run.json", record)

    result = sweep(grid, out, n_jobs=1, device="cpu")
    assert [(one.status, one.run.name) for one in result.findings] == [("complete", run.name)]
    assert result.rows[0].n_complete == 1
    assert [path.name for path in out.glob("runs/*")] == [run.name]
    (entry,) = json.loads((out / "results.json").read_text())["runs"]
    assert (entry["cell"], entry["run"]) == (cell.name, f"runs/{run.name}")

    assert complete_runs(out) == {cell.recipe: run}
    monkeypatch.setattr(run_list, "VERSION", 2)
    assert complete_runs(out) == {}
    write_json(out / "jobs" / f"{run.name}.json", {"version": 2})
    assert complete_runs(out) == {cell.recipe: run}


@pytest.mark.parametrize("fault", ["other recipe", "no recipe any more", "unfinished", "damaged"])
def test_no_other_run_stands_for_a_cell(tmp_path: Path, fault: str) -> None:
    (_, cell), out = only_cell(tmp_path), tmp_path / "out"
    run = made_run(
        out / "runs" / "old", cell.recipe, status="running" if fault == "unfinished" else "complete"
    )
    record = json.loads((run / "run.json").read_text())
    if fault == "other recipe":
        record["recipe"]["label_smoothing"] = 0.1
    if fault == "no recipe any more":
        record["recipe"]["forgotten"] = 1
    write_sealed(run / "run.json", record)
    if fault == "damaged":
        (run / "run.json").write_text("{")
    assert cell.recipe not in complete_runs(out)
    assert run_of(cell, out, complete_runs(out)) == (out / "runs" / cell.name, False)


def test_a_run_of_another_recipe_in_a_cells_folder_is_not_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, cell = only_cell(tmp_path)
    other = cell.recipe.model_copy(update={"label_smoothing": 0.1})
    run = made_run(tmp_path / "run", other, status="running")
    before = (run / "run.json").read_bytes()
    job = tmp_path / "job.json"
    write_json(job, {"recipe": cell.recipe.model_dump(mode="json"), "out": str(run)})
    assert main(job) == 2
    assert "begun by another recipe" in capsys.readouterr().err
    assert (run / "run.json").read_bytes() == before


def test_methods_that_need_a_pattern_are_swept_and_told_with_it(tmp_path: Path) -> None:
    """Cells are trained in this process, one after the other, as those of a sweep are in theirs."""
    grid, out = tmp_path / "grid.toml", tmp_path / "out"
    grid.write_text(
        'recipe = "digits"\nmethods = ["sr-ste", "asp", "sparse-momentum"]\nchanges = { epochs = 1 }\n'
        '[vary]\n"sparsity.pattern" = ["2:4", "1:4"]\n'
    )
    for cell in run_list.cells_of(load_grid(grid)):
        job = out / "jobs" / f"{cell.name}.json"
        recipe = cell.recipe.model_dump(mode="json")
        folders = {"out": str(out / "runs" / cell.name), "data_dir": None, "download": False}
        write_json(job, {"recipe": recipe, **folders, "device": "cpu", "parent": os.getppid()})
        assert main(job) == 0
    result = sweep(grid, out, n_jobs=1, device="cpu")
    assert [row.label for row in result.rows] == [
        f"{method} {pattern}" for method in ("sr-ste", "asp", "sparse-momentum") for pattern in ("2:4", "1:4")
    ]
    runs = json.loads((out / "results.json").read_text())["runs"]
    for run in runs:
        allowed = {"2:4": 1 / 2, "1:4": 1 / 4}[run["pattern"]]
        assert run["n_active"] == pytest.approx(allowed * run["n_masked"], rel=0.01)
    by_density, by_cost, by_pattern, *courses = re.findall(
        r"<svg.*?</svg>", (out / "report.html").read_text(), re.DOTALL
    )
    assert len(courses) == len(runs)
    assert by_cost.count("<circle") == len(runs)
    for drawing in (by_density, by_pattern):
        assert "2:4" not in re.sub(
            r"0 is [^<]*", "", drawing
        )  # lines are of methods, and patterns their points
        assert drawing.count("<circle") == len(runs)


def test_a_run_of_a_sweep_that_cannot_be_scored_ends_before_it_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = np.zeros((40, 8, 8, 1), np.uint8)
    y: np.ndarray = np.zeros(40, int)
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    recipe = load_recipe("digits", changes={"data": f"npz:{tmp_path / 'd.npz'}"})
    job = {
        "recipe": recipe.model_dump(mode="json", exclude_none=True),
        "out": str(tmp_path / "run"),
        "data_dir": None,
        "download": False,
        "device": "cpu",
        "parent": os.getppid(),
    }
    write_json(tmp_path / "job.json", job)
    assert main(tmp_path / "job.json") == 2
    assert "digits-cnn has one output, so its top-1 accuracy cannot be computed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
