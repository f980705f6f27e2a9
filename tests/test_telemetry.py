"""onnxruntime reports nothing to its maker, and leaves nothing in the user's folders, unless the user asks
for it.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

import sparse_export
from sparse_export import child
from sparse_export.cli import main as program
from sparse_export.onnxruntime_import import load_onnxruntime
from sparse_export.signature import class_signature
from sparse_export.telemetry import ONNXRUNTIME_VARIABLE, telemetry_environment, turn_telemetry_off

CHECKOUT = Path(sparse_export.__file__).resolve().parents[1]
TRITON_MODEL = CHECKOUT / "sparse_export" / "serving" / "triton_model.py"


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", ends[:1], ends[1:])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def _left_by(tmp_path: Path, *words: str | Path) -> list[str]:
    """Run Python where the environment says nothing of telemetry; the files that are then in the home folder.

    It has no other variables: onnxruntime reports nothing where those of a CI service are set.
    """
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, *words],
        env={
            "HOME": str(home),
            "XDG_CACHE_HOME": str(home / ".cache"),
            "PYTHONPATH": str(CHECKOUT),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [str(path.relative_to(home)) for path in home.rglob("*") if not path.is_dir()]


def test_a_session_leaves_nothing_in_the_users_folders(model_path: Path, tmp_path: Path) -> None:
    code = """
import os, sys
before = dict(os.environ)
from pathlib import Path
import numpy as np
from sparse_export.runtimes.onnxruntime import open_session
assert os.environ == before and "onnxruntime" not in sys.modules  # the import of a module has no effects
with open_session(Path(sys.argv[1])) as session:
    assert session.run(np.full((1, 2), -1, dtype=np.float32)).tolist() == [[0, 0]]
"""
    assert _left_by(tmp_path, "-c", code, model_path) == []


def test_the_process_that_tries_a_file_leaves_nothing_there(model_path: Path, tmp_path: Path) -> None:
    request = {
        "model": str(model_path),
        "inputs": {},
        "signature": asdict(class_signature((2,), 2, names=("x", "y"))),
        "provider": "cpu",
        "limit_s": 60,
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    worker = ("-m", "sparse_export.runtimes.probe_worker", "request.json", "result.json")
    assert _left_by(tmp_path, *worker) == []
    assert json.loads((tmp_path / "result.json").read_text()) == {"result": None}


def test_the_model_that_runs_inside_the_server_leaves_nothing_there(model_path: Path, tmp_path: Path) -> None:
    code = """
import runpy, sys
from pathlib import Path
import numpy as np
names = runpy.run_path(sys.argv[1])
network = names["_Onnxruntime"](Path(sys.argv[2]), 1, False, 0, {"packed": False, "outputs": ["y"]})
assert network.run({"x": np.full((1, 2), -1, dtype=np.float32)})["y"].tolist() == [[0, 0]]
"""
    assert _left_by(tmp_path, "-c", code, TRITON_MODEL, model_path) == []


def test_the_program_turns_it_off_before_a_users_module_can_import_onnxruntime(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(ONNXRUNTIME_VARIABLE)
    seen = []
    monkeypatch.setattr(program.cli, "main", lambda: seen.append(os.environ.get(ONNXRUNTIME_VARIABLE)))
    with pytest.raises(AssertionError, match="exits by itself"):
        program.main()
    assert seen == ["1"]


def test_loading_onnxruntime_turns_it_off_for_child_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ONNXRUNTIME_VARIABLE)
    assert child.environment()[ONNXRUNTIME_VARIABLE] == "1"  # also where this process does not load it
    assert ONNXRUNTIME_VARIABLE not in os.environ
    assert load_onnxruntime().__name__ == "onnxruntime"
    assert os.environ[ONNXRUNTIME_VARIABLE] == "1"


@pytest.mark.parametrize("value", ["0", "1", "no", ""])
def test_the_users_own_setting_is_kept(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ONNXRUNTIME_VARIABLE, value)
    turn_telemetry_off()
    assert os.environ[ONNXRUNTIME_VARIABLE] == value
    assert telemetry_environment()[ONNXRUNTIME_VARIABLE] == value
    assert child.environment()[ONNXRUNTIME_VARIABLE] == value


def _imports(text: str) -> Iterator[str]:
    """Names of the modules that a source imports, by a statement or as text that is handed to a function for
    it.
    """
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            yield from (
                a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)
            )


def test_onnxruntime_is_imported_in_one_place() -> None:
    """By `load_onnxruntime`, which hands its argument on; and inside the server, where this package need not
    be.
    """
    places = set()
    for folder in ("sparse_export", "train", "cli", "models", "benchmarks"):
        for path in (CHECKOUT / folder).rglob("*.py"):
            text = path.read_text()
            if "onnxruntime" in text and any(name.split(".")[0] == "onnxruntime" for name in _imports(text)):
                places.add(path)
    assert places == {TRITON_MODEL}
