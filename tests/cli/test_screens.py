"""What a person sees of the commands on a terminal of 80 and of 120 columns."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Made
from tests.terminal import CHECKOUT, Program, Watched

WIDTHS = [80, 120]
# One epoch, and measurements of 8 rounds: the screens of the demo are those of the commands that it calls.
SMALL_DEMO = """
import functools
from sparse_export.cli import _demo_run
_demo_run.compare = functools.partial(_demo_run.compare, rounds=8, batches=(1,))
_demo_run.load_recipe = lambda name, changes, load=_demo_run.load_recipe: load(name, changes=changes | {"epochs": 1})
"""
GRID = 'recipe = "digits"\nmethods = ["rigl"]\ndensities = [0.1]\nchanges = {epochs = 1}\n'
# What is on a screen, whatever the figures are. Titles of columns and of rows, word for word.
SAID = {
    "train": "digits-cnn on digits, epoch 1/1 loss validation accuracy density test accuracy estimates: not measured",
    "demo": "building validating comparing dense with two-four sparse against dense control: dense twice, ms "
    "golden pair passed Report to open in a browser, two-four",
    "sparsify": "layer shape pattern sum |w| kept error note original sparsified fine-tuned seconds",
    "compare": "dense sparse sparse against dense accuracy density of masked layers precision model.onnx, bytes "
    "parameters multiply-adds a sample batch 1, median ms 99th percentile ms control: dense twice, ms",
    "gate": "PASSED. Kept: files, weights, graph, score.",
    "validate": "bundle test data accuracy, ONNX drop from recorded golden pair against its network at batch result",
    "sweep": "runs test accuracy % validation training MACs mean density explored est. channels est. MACs step ms "
    "rigl",
    "doctor": "Machine Python system CPU memory GPU Runtimes torch onnxruntime Libraries Folders trust store",
}
# The words of each, OUT for a folder of this width's own, and what makes it small.
COMMANDS: dict[str, tuple[list[str], str]] = {
    "train": (["digits", "--epochs", "1", "--out", "OUT", "--device", "cpu"], ""),
    "demo": (["--out", "demo"], SMALL_DEMO),
    "sparsify": (
        ["dense-run", "--method=activation", "--calibration-samples=16", "--finetune=1", "--out", "OUT"],
        "",
    ),
    "compare": (["dense", "sparse-net", "--rounds", "8", "--batch", "1"], ""),
    "gate": (["sparse-net", "--against", "dense", "--max-drop", "50"], ""),
    "validate": (["sparse-net"], ""),
    "sweep": (["grid.toml", "--out", "sweep", "--device", "cpu", "--jobs", "1"], ""),
    "doctor": ([], ""),
}
BARS = {"train": "train", "demo": "two-four", "sparsify": "prune", "compare": "time"}


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    with Program() as program:
        yield program


@pytest.fixture(scope="module")
def vocabulary() -> frozenset[str]:
    """Every word that stands in the program, its documents and the names of its files."""
    files = [
        path
        for folder in ("sparse_export", "train", "cli", "models", "docs")
        for path in (CHECKOUT / folder).rglob("*")
        if path.suffix in (".py", ".toml", ".md")
    ]
    return frozenset(word for path in files for word in words(f"{path} {path.read_text()}"))


def words(text: str) -> list[str]:
    """Not the letters of a hash."""
    return re.findall(r"(?<![a-z0-9])[a-z]{3,}(?![a-z0-9])", text.lower())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, made: Made) -> Path:
    """Where all run, with short names. A sweep that is complete already only draws its table again."""
    folder = tmp_path_factory.mktemp("screens")
    (folder / "grid.toml").write_text(GRID)
    for name, path in (("dense", made.dense), ("sparse-net", made.sparse), ("dense-run", made.dense_run)):
        (folder / name).symlink_to(path)
    return folder


CASES = [
    pytest.param(
        (name, width), id=f"{name}-{width}", marks=[pytest.mark.full] * (name == "demo" and width > 80)
    )
    for width in WIDTHS
    for name in SAID
]


@pytest.fixture(params=CASES)
def screen(request: pytest.FixtureRequest, program: Program, folder: Path) -> tuple[str, int, Watched]:
    name, width = request.param
    given, before = COMMANDS[name]
    given = [f"{name}-{width}" if word == "OUT" else word for word in given]
    return name, width, program([name, *given], width=width, folder=folder, before=before)


def test_a_screen_has_every_column_whole_words_and_no_warning(
    screen: tuple[str, int, Watched], vocabulary: frozenset[str]
) -> None:
    name, width, seen = screen
    assert seen.exit_code == 0, seen.text
    assert "warn" not in seen.text.lower() and "Traceback" not in seen.text
    assert seen.wrapped == []  # the terminal itself would break words
    assert max(map(len, seen.lines)) <= width
    assert [word for word in words(seen.text) if word not in vocabulary] == []
    there = seen.text.split()
    assert [word for word in SAID[name].split() if word not in there] == []
    frames = [frame for frame in seen.frames if frame.startswith(BARS.get(name, "\0"))]
    assert bool(frames) == (name in BARS)
    for frame in frames:
        assert len(frame) <= width
        assert re.search(r"\d %  \d+:\d\d (left|so far)", frame), frame
        assert "…" not in frame
