"""Closed streams, full disks, little memory, odd names and code that leaves: an error in words, no traceback."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.graph.graphs import one_node, saved

PROGRAM = f"{shlex.quote(sys.executable)} -m sparse_export"


def call(line: str, **surroundings: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `se` is the program."""
    return subprocess.run(
        ["bash", "-c", line.replace("se ", f"{PROGRAM} ", 1)],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=60,
        check=False,
        env={**os.environ, **surroundings},
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("odd")
    return shlex.quote(str(saved(one_node("Gemm", (8, 8), ("n", 8), transB=1), folder)))


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("se inspect FILE >&-", 0, ""),
        ("se inspect FILE >/dev/null 2>&-", 0, ""),
        ("se inspect /nowhere 2>&-", 2, ""),
        ("se inspect FILE >&- 2>&-", 0, ""),
        ("se inspect FILE >/dev/full", 1, "No space left on device"),
        ("se inspect FILE --json >/dev/full", 1, "No space left on device"),
        ("se inspect /nowhere --json >/dev/full", 2, "does not exist"),
        ("se inspect /nowhere 2>/dev/full", 2, ""),
        ("ulimit -v 300000; se inspect FILE", 5, "307,200,000 bytes of address space"),
    ],
)
def test_closed_streams_full_disks_and_little_memory(line: str, code: int, words: str, file: str) -> None:
    ended = call(line.replace("FILE", file))
    assert ended.returncode == code, ended.stderr
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr


def test_an_error_is_still_the_document_of_a_command(file: str) -> None:
    ended = call("se inspect /nowhere --json 2>&-")
    assert json.loads(ended.stdout)["error"]["exit_code"] == 2


@pytest.mark.parametrize("name", ["na\udcffme.onnx", "turned\u202exnno.onnx"])
def test_names_are_shown_as_escapes(name: str, tmp_path: Path) -> None:
    """Bytes that are no text, and marks that turn it."""
    (tmp_path / name).write_bytes(saved(one_node("Gemm", (8, 8), ("n", 8)), tmp_path).read_bytes())
    quoted = shlex.quote(str(tmp_path / name))
    odd = name[2 if "na" in name else 6]
    escape = f"\\u{ord(odd):04x}"
    for line, code in ((f"se inspect {quoted}", 0), (f"se inspect a {quoted}", 2)):
        ended = call(line)
        assert ended.returncode == code, ended.stderr
        assert odd not in ended.stdout + ended.stderr
        assert escape in ended.stdout + ended.stderr
        assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("where", ["factory", "forward"])
def test_code_that_leaves_is_told_of(where: str, tmp_path: Path) -> None:
    """Before, it ended the command with its own code, 0 too, and without a word."""
    body = {
        "module": "import sys\nsys.exit(0)\n",
        "factory": "import sys\ndef make():\n    sys.exit(0)\n",
        "forward": "import sys, torch\nclass make(torch.nn.Linear):\n"
        "    def __init__(self): super().__init__(64, 8)\n    def forward(self, x): sys.exit(0)\n",
    }[where]
    (tmp_path / "leaves.py").write_text(body)
    words = f"sparsify leaves:make --input-shape 64 --data none --method magnitude --out {tmp_path / 'o'}"
    ended = call(f"cd {shlex.quote(str(tmp_path))}; se {words}", PYTHONPATH=str(Path(__file__).parents[2]))
    assert ended.returncode in (1, 2)
    assert "Traceback" not in ended.stderr
    assert ("SystemExit" if where != "forward" else "sys.exit(0)") in ended.stderr


WEIGHTS = {
    "meta": lambda w: w.to("meta"),
    "sparse": lambda w: w.to_sparse(),
    "sparse_csr": lambda w: w.to_sparse_csr(),
    "complex": lambda w: w.to(torch.complex64),
    "int8": lambda w: w.to(torch.int8),
}


@pytest.mark.filterwarnings("ignore")  # torch's own, of sparse tensors
@pytest.mark.parametrize("kind", WEIGHTS)
def test_tensors_of_another_kind_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    from sparse_export.errors import ArtefactError
    from sparse_export.models.weights import load_weights

    network = torch.nn.Linear(8, 4)
    state = dict(network.state_dict())
    state["weight"] = WEIGHTS[kind](state["weight"])
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ArtefactError, match=f"weight is .*{kind.partition('_')[0]}"):
        load_weights(network, tmp_path / "w.pt")


@pytest.mark.parametrize("text", ["a=" + "[" * 20000 + "]" * 20000, f"[{'.'.join('a' * 20000)}]\nb=1"])
def test_toml_within_toml_within_toml_is_refused(text: str, tmp_path: Path) -> None:
    from sparse_export.errors import RecipeError
    from sparse_export.sweep.grid import load_grid
    from sparse_export.train.recipe import load_recipe

    file = tmp_path / "deep.toml"
    file.write_text(text)
    for read in (load_recipe, load_grid):
        with pytest.raises(RecipeError, match=r"too deep|more than 32 deep"):
            read(file)


def test_a_batch_above_the_data_is_refused_before_training(tmp_path: Path) -> None:
    """Before, it was made as large as the data, and one step an epoch was trained."""
    from sparse_export.errors import UsageError
    from sparse_export.train import train
    from sparse_export.train.recipe import load_recipe

    recipe = load_recipe("digits", changes={"batch_size": 100_000})
    with pytest.raises(UsageError, match="batch_size is 100,000, and the training set has"):
        train(recipe, tmp_path / "run")


def test_pipes_are_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_export import trust
    from sparse_export.errors import ArtefactError
    from sparse_export.tasks.data.imagefolder import open_picture

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    (tmp_path / "sparse-export").mkdir()
    os.mkfifo(trust.store_path(), 0o600)
    with pytest.raises(ArtefactError, match="plain file"):
        trust.is_trusted("0" * 64)
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ArtefactError, match="plain file"):
        open_picture(tmp_path / "a.png")
