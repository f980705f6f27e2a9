"""What was measured is printed, also where it cannot be stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from sparse_export.cli._click import click
from sparse_export.cli._common import json_option, showing
from sparse_export.cli.main import LazyGroup, cli
from sparse_export.errors import OutputError


@click.command("measure")
@json_option
def measure(as_json: bool) -> None:
    with showing({"ms": 1.5}, "1.5 ms", as_json):
        raise OutputError("Cannot write it.")


@pytest.mark.parametrize("words", [["measure"], ["measure", "--json"]])
def test_a_result_that_cannot_be_stored_is_printed(words: list[str]) -> None:
    group = LazyGroup("cli", commands={"measure": measure})
    group.resolve_command = lambda ctx, args: (args[0], measure, args[1:])  # type: ignore[method-assign]
    ended = CliRunner().invoke(group, words)
    assert ended.exit_code == 1
    assert "Error: Cannot write it." in ended.stderr
    if "--json" in words:
        assert json.loads(ended.stdout) == {"ms": 1.5}
    else:
        assert ended.stdout == "1.5 ms\n"


@pytest.mark.parametrize("command", ["bench", "bench_train", "validate", "gate", "compare", "plan"])
def test_every_command_that_measures_does_so(command: str) -> None:
    source = (Path(__file__).parents[2] / "cli" / f"{command}.py").read_text()
    assert "with showing(" in source or "else showing(" in source
    assert "print_result" not in source


def test_a_folder_in_place_of_a_page_is_refused_before_measuring(tmp_path: Path) -> None:
    ended = CliRunner().invoke(cli, ["compare", "nowhere", "nowhere", "--html", str(tmp_path)])
    assert ended.exit_code == 2
    assert "is a folder. Name a file" in ended.stderr
