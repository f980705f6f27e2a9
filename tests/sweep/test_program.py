"""Loops of a user's own in a sweep, and pages of runs that are there already."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sparse_export.cli.sweep import command
from sparse_export.errors import RecipeError, SparseExportError, UsageError
from sparse_export.formats.run import read_run_info
from sparse_export.sweep.from_runs import findings_of, varied_keys
from sparse_export.sweep.grid import load_grid
from sparse_export.sweep.run_list import Cell, cells_of
from sparse_export.sweep.running import run_cells
from sparse_export.sweep.sweep import page_of_runs, sweep
from sparse_export.train.recipe import load_recipe
from tests.making_runs import network_and_masks, save_run

PROGRAM = 'program = "tests.sweep.own_program:main"\n'


def cells(tmp_path: Path, text: str) -> list[Cell]:
    file = tmp_path / "grid.toml"
    file.write_text(text)
    return cells_of(load_grid(file), tmp_path)


def arguments(cell: Cell) -> dict[str, Any]:
    document = cell.document()
    assert document["program"] == "tests.sweep.own_program:main"
    found: dict[str, Any] = document["arguments"]
    return found


def test_a_program_is_called_with_seed_and_settings(tmp_path: Path) -> None:
    found = cells(
        tmp_path,
        PROGRAM + 'methods = ["set", "rigl"]\ndensities = [0.1]\nseeds = [3, 4]\nchanges = { lr = 0.5 }\n'
        "[vary]\nwidth = [8, 16]\n[method.rigl]\nchanges = { lr = 0.25 }\n",
    )
    assert [arguments(cell) for cell in found] == [
        {"density": 0.1, "lr": lr, "method": method, "seed": seed, "width": width}
        for method, lr in (("set", 0.5), ("rigl", 0.25))
        for width in (8, 16)
        for seed in (3, 4)
    ]
    assert len({cell.name for cell in found}) == 8
    assert found[0].setting == (("width", 8),)
    (plain,) = cells(tmp_path, PROGRAM)
    assert arguments(plain) == {"seed": 0}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (PROGRAM + 'recipe = "digits"\nmethods = ["set"]', "both a recipe and a program"),
        (PROGRAM + "changes = { seed = 3 }", "The grid has seed in changes"),
        (PROGRAM + "[vary]\ndensity = [0.1]", "The grid has density in vary"),
        (PROGRAM + "changes = { a = { b = 1 } }", "The grid has a = "),
        (PROGRAM + 'changes = { "a-b" = 1 }', "a program takes keyword arguments"),
        (PROGRAM + '[vary]\n"a.b" = [1]', "a program takes keyword arguments"),
        ('recipe = "digits"', "lacks the key 'methods'"),
    ],
)
def test_a_grid_of_a_program_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises((RecipeError, UsageError), match=said):
        cells(tmp_path, text)


def test_a_users_own_loop_is_swept_and_trained_once(tmp_path: Path) -> None:
    grid, out = tmp_path / "grid.toml", tmp_path / "out"
    grid.write_text(PROGRAM + "densities = [0.3]\nseeds = [0, 1]\n[vary]\nwidth = [8]\n")
    result = sweep(grid, out, n_jobs=2, device="cpu")
    assert [one.status for one in result.findings] == ["complete"] * 2
    (row,) = result.rows
    assert row.label == "tests.sweep.own_program:main 0.3, width 8"
    infos = [read_run_info(one.run) for one in result.findings]
    assert [info.seed for info in infos] == [0, 1]
    assert row.test is not None
    assert row.validation is not None
    assert row.test.mean == pytest.approx(sum(info.test.figure for info in infos if info.test) / 2)
    assert row.explored is not None
    assert 0.3 < row.explored <= 1
    assert "width 8" in (out / "report.html").read_text()
    stamps = [(one.run / "model.safetensors").stat().st_mtime_ns for one in result.findings]
    again = sweep(grid, out, n_jobs=2, device="cpu")
    assert [(one.run / "model.safetensors").stat().st_mtime_ns for one in again.findings] == stamps

    grid.write_text(PROGRAM + "densities = [0.3]\nseeds = [0]\n[vary]\nwidth = [9]\n")
    (other,) = sweep(grid, out, n_jobs=1, device="cpu").findings
    assert other.run not in [one.run for one in result.findings]


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("tests.sweep.own_program:leaves_nothing", "left no finished run"),
        ("tests.sweep.own_program:fails", "somebody's own mistake"),
        ("tests.sweep.own_program:number", "A function was expected"),
        ("tests.sweep.own_program:nothing", "has no 'nothing'"),
        ("nowhere.at_all:main", "cannot be imported"),
    ],
)
def test_a_program_that_fails_is_told_with_its_reason(tmp_path: Path, program: str, said: str) -> None:
    grid = tmp_path / "grid.toml"
    grid.write_text(f'program = "{program}"\n')
    with pytest.raises(SparseExportError, match=f"1 of 1 runs failed.*{said}"):
        sweep(grid, tmp_path / "out", n_jobs=1, device="cpu")


def made(folder: Path, **changes: Any) -> Path:
    """A finished run by a recipe, untrained."""
    recipe = load_recipe("digits", changes=changes)
    module, masks = network_and_masks(density=0.1)
    method = "dense" if recipe.dense else recipe.sparsity.method
    table = recipe.model_dump(mode="json")
    return save_run(folder, module, masks, method=method, recipe=table, seed=recipe.seed).path


def test_runs_that_are_there_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    runs = [
        made(tmp_path / f"{method}-{rate}-{seed}", seed=seed, sparsity={"method": method, "prune_rate": rate})
        for seed in (1, 0)
        for method in ("set", "rigl")
        for rate in (0.3, 0.5)
    ]
    runs.append(made(tmp_path / "dense", dense=True))
    findings = findings_of(runs)
    assert varied_keys(findings) == ["sparsity.prune_rate"]
    assert [(one.cell.method, dict(one.cell.setting), one.cell.seed) for one in findings] == [
        (method, {"sparsity.prune_rate": rate}, seed)
        for method in ("set", "rigl")
        for rate in (0.3, 0.5)
        for seed in (0, 1)
    ] + [("dense", {}, 0)]
    result = CliRunner().invoke(
        command,
        ["--from", *map(str, runs), "--out", str(tmp_path / "page"), "--json"],
        catch_exceptions=False,
    )
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert [row["n_complete"] for row in document["rows"]] == [2, 2, 2, 2, 1]
    text = (tmp_path / "page" / "report.html").read_text()
    assert "Sensitivity to sparsity.prune_rate" in text
    assert str(runs[0]) in text


def test_a_key_that_is_not_set_or_not_read_is_not_in_the_setting(tmp_path: Path) -> None:
    runs = [
        made(tmp_path / "a", sparsity={"method": "set", "prune_rate": 0.3}),
        made(tmp_path / "b", sparsity={"method": "set", "growth": "momentum"}),
        made(tmp_path / "c", sparsity={"method": "static"}),
    ]
    assert [one.cell.setting for one in findings_of(runs)] == [
        (("sparsity.prune_rate", 0.3),),
        (("sparsity.prune_rate", 0.5), ("sparsity.growth", "momentum")),
        (),
    ]


def test_two_copies_of_one_run_are_no_two_seeds(tmp_path: Path) -> None:
    runs = [made(tmp_path / name, sparsity={"method": "set"}) for name in ("a", "b")]
    with pytest.raises(UsageError, match="are seed 0 of the same method"):
        page_of_runs(runs, tmp_path / "page")
    with pytest.raises(UsageError, match="No run was given"):
        page_of_runs([], tmp_path / "page")
    with pytest.raises(SparseExportError, match=r"run\.json"):
        page_of_runs([tmp_path], tmp_path / "page")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--from", "a", "--jobs", "2"], "leave out --jobs"),
        (["--from", "a", "--cluster", "dask:x"], "leave out --cluster"),
        (["a.toml", "b.toml"], "One grid at a time"),
    ],
)
def test_options_that_contradict_each_other_are_refused(words: list[str], said: str) -> None:
    result = CliRunner().invoke(command, words)
    assert result.exit_code == 2
    assert said in result.output


class _Nowhere:
    """Runs nothing; notes what would have been run. Every run ends at once, without an error."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def start(self, job: Mapping[str, Any], job_file: Path, log: Path, slot: int) -> _Nowhere:
        self.seen.append((job["arguments"]["method"], job["arguments"]["seed"]))
        return self

    def poll(self) -> int:
        return 0

    def stop(self) -> None:
        raise AssertionError("nothing is running")

    def wait(self) -> None:
        raise AssertionError("nothing is running")


def test_all_methods_come_before_the_next_seed(tmp_path: Path) -> None:
    found = cells(tmp_path, PROGRAM + 'methods = ["set", "rigl"]\ndensities = [0.1]\nseeds = [3, 1]\n')
    place = _Nowhere()
    said: list[str] = []
    findings, stopped = run_cells(found, tmp_path, n_jobs=1, place=place, say=said.append)
    assert place.seen == [("set", 3), ("rigl", 3), ("set", 1), ("rigl", 1)]
    assert not stopped
    assert [finding.cell for finding in findings] == found, "the table keeps the grid's order"
    assert said[-1].startswith("4/4")
