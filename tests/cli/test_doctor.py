"""What doctor says, and that nothing on the machine can make it fall over."""

from __future__ import annotations

import errno
import importlib
import json
import os
import pwd
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sparse_export.doctor import Finding, examine
from tests.cli.conftest import Call


def _finding(name: str) -> Finding:
    (found,) = [found for found in examine().findings if found.name == name]
    return found


def test_doctor_shows_a_table_and_ends_with_nought(call: Call) -> None:
    result = call("doctor")
    assert result.exit_code == 0
    assert {"Machine", "Runtimes", "Libraries", "Folders"} <= set(result.stdout.splitlines())


def test_doctor_with_json_has_a_state_for_every_finding(call: Call) -> None:
    findings = json.loads(call("doctor", "--json").stdout)["findings"]
    assert {found["state"] for found in findings} <= {"ok", "missing", "broken"}
    assert {"Python", "CPU", "torch", "onnxruntime", "tensorrt", "data"} <= {
        found["name"] for found in findings
    }


def test_every_missing_or_broken_thing_has_a_hint() -> None:
    assert [found for found in examine().findings if found.state != "ok" and not found.hint] == []


@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_a_library_that_cannot_be_imported_is_a_finding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def import_module(module: str, package: str | None = None) -> ModuleType:
        if module == name:
            raise ImportError(f"lib{name}.so: cannot open shared object file\nand more")
        return real(module, package)

    monkeypatch.setattr(importlib, "import_module", import_module)
    found = _finding(name)
    assert (found.state, found.value) == (
        "broken",
        f"ImportError: lib{name}.so: cannot open shared object file",
    )
    assert found.hint


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("__version__ = '11.1'", "ok"),
        ("raise OSError('no driver')", "broken"),
        ("__version__ = '8.6'", "broken"),
        ("pass", "broken"),
    ],
)
def test_an_installed_tensorrt_is_imported_to_see_whether_it_works(
    text: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    assert _finding("tensorrt").state == state
    sys.modules.pop("tensorrt", None)


def test_a_data_folder_is_shown_with_what_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "MNIST").mkdir()
    monkeypatch.setenv("SPARSE_EXPORT_DATA", str(tmp_path))
    assert (_finding("data").state, _finding("data").value) == ("ok", f"{tmp_path}: MNIST")


def test_the_trust_store_is_named_where_it_would_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert str(tmp_path) in _finding("trust store").value


def _refuse(monkeypatch: pytest.MonkeyPatch, method: str, place: Path) -> None:
    real = getattr(Path, method)

    def refusing(self: Path) -> Any:
        if self.is_relative_to(place):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return real(self)

    monkeypatch.setattr(Path, method, refusing)


@pytest.mark.parametrize("method", ["is_dir", "iterdir"])
def test_a_data_folder_that_cannot_be_looked_into_is_a_finding(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSE_EXPORT_DATA", str(tmp_path))
    _refuse(monkeypatch, method, tmp_path)
    found = _finding("data")
    assert (found.state, "Permission denied" in found.value) == ("broken", True)


def test_a_trust_store_that_cannot_be_looked_at_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    _refuse(monkeypatch, "exists", tmp_path)
    found = _finding("trust store")
    assert (found.state, "Permission denied" in found.value) == ("broken", True)


def test_no_home_folder_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: int) -> None:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for variable in ("HOME", "XDG_DATA_HOME", "SPARSE_EXPORT_DATA"):
        monkeypatch.delenv(variable, raising=False)
    for name, variable in (("data", "SPARSE_EXPORT_DATA"), ("trust store", "XDG_DATA_HOME")):
        found = _finding(name)
        assert (found.state, variable in found.hint) == ("broken", True)
