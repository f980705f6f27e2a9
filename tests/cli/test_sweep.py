"""`sweep` from the command line; tests/sweep has interruption, failure and the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Call

GRID = 'recipe = "digits"\nmethods = ["{}"]\ndensities = [0.1]\nchanges = {{ epochs = 1 }}\n'


def test_a_sweep_ends_with_its_table_and_its_page_and_json_has_the_runs(call: Call, tmp_path: Path) -> None:
    grid, out = tmp_path / "grid.toml", tmp_path / "out"
    grid.write_text(GRID.format("rigl"))
    result = call("sweep", grid, "--out", out, "--device", "cpu", "--jobs", 1)
    assert result.exit_code == 0, result.stderr
    first, row, *direction, page = [line for line in result.stdout.splitlines() if line]
    names = ["runs", "test accuracy %", "validation accuracy %", "training MACs", "mean density", "explored"]
    names += ["est. channels", "est. MACs", "step ms"]
    assert " ".join(first.split()) == " ".join(names)
    assert direction == ["Of the accuracy higher is better."]
    assert row.startswith("rigl 0.1")
    assert " 1/1 " in row
    assert Path(page).is_file()
    again = call("sweep", grid, "--out", out, "--device", "cpu", "--json")
    document = json.loads(again.stdout)
    assert document["report"] == page
    (run,) = document["runs"]
    assert f"{run['test_percent']:.2f}" in row
    assert "complete already" in again.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GRID.format("set-momentum"), "run set-momentum-0.1-seed0"),
        (GRID.format("set") + "seed = 3\n", "unknown key 'seed'"),
        ("methods = ", "is not TOML"),
    ],
)
def test_a_bad_grid_is_wrong_usage_and_leaves_nothing(
    call: Call, tmp_path: Path, text: str, said: str
) -> None:
    grid = tmp_path / "grid.toml"
    grid.write_text(text)
    result = call("sweep", grid, "--out", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_missing_grid_or_no_jobs_are_wrong_usage(call: Call, tmp_path: Path) -> None:
    assert call("sweep", tmp_path / "none.toml").exit_code == 2
    grid = tmp_path / "grid.toml"
    grid.write_text(GRID.format("set"))
    assert call("sweep", grid, "--jobs", 0).exit_code == 2


def test_train_takes_a_method_and_names_its_folder_by_it(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("train", "digits", "--method", "snip", "--epochs", 1, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert (document["method"], document["run"]) == ("snip", "runs/digits-snip-0.2-seed0")
    refused = call("train", "digits", "--method", "magnitude", "--pattern", "2:4", "--out", "x")
    assert refused.exit_code == 2
    assert "takes no pattern" in refused.stderr
