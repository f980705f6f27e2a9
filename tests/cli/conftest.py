"""A dense and a sparse run of the embedded digits, made once by the commands themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from sparse_export.cli.main import cli

Call = Callable[..., Result]


@dataclass(frozen=True)
class Made:
    """Folders that the commands wrote."""

    dense_run: Path
    sparse_run: Path
    dense: Path
    sparse: Path


def _call(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words], prog_name="sparse-export")


@pytest.fixture(scope="session")
def call() -> Call:
    """Call the program in this process: `call("build", run)` gives exit_code, stdout, stderr."""
    return _call


@pytest.fixture(scope="session")
def made(call: Call, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    made = Made(folder / "dense-run", folder / "sparse-run", folder / "dense", folder / "sparse")
    for run, bundle, kind in (
        (made.dense_run, made.dense, ("--dense",)),
        (made.sparse_run, made.sparse, ("--density", "0.2")),
    ):
        for words in (
            ("train", "digits", *kind, "--epochs", 2, "--out", run, "--device", "cpu"),
            ("build", run, "--out", bundle),
        ):
            result = call(*words)
            assert result.exit_code == 0, result.stderr
    return made
