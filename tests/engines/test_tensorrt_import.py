"""TensorRT comes in by one module, and what is missing is reported."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparse_export.engines import tensorrt_import
from sparse_export.errors import MissingCapability, UnknownNameError, UsageError

CHECKOUT = Path(__file__).resolve().parents[2]
LIBRARIES = {"tensorrt", "tensorrt_rtx"}


@pytest.fixture
def library_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in front of all others, where a test puts a library of its own."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = {name: sys.modules.pop(name, None) for name in LIBRARIES}
    yield tmp_path
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def test_a_target_that_nobody_knows_is_an_error() -> None:
    with pytest.raises(UnknownNameError, match="tensorrt-rtx"):
        tensorrt_import.library("tensort")


@pytest.mark.parametrize("target", tensorrt_import.TARGETS)
def test_an_absent_library_ends_with_5_and_says_what_to_install(
    target: tensorrt_import.Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_import, "is_installed", lambda _: False)
    with pytest.raises(MissingCapability, match=r"pip install '\.\[\w+\]'.*Installation Guide") as caught:
        tensorrt_import.library(target)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "raise ImportError('libnvinfer.so.10: cannot open\\nmore')",
            "ImportError: libnvinfer.so.10: cannot open",
        ),
        ("", "no attribute '__version__'"),
        ("__version__ = '8.6.1'", "has version 8.6.1, and 10 is the lowest"),
        ("__version__ = 'dev'", "has version dev"),
    ],
)
def test_a_library_that_does_not_work_is_missing_too(text: str, why: str, library_of: Path) -> None:
    (library_of / "tensorrt.py").write_text(text)
    with pytest.raises(MissingCapability, match=why):
        tensorrt_import.library("tensorrt")


@pytest.mark.parametrize("version", ["10.0.1", "10.16.1.11", "11.4.1"])
def test_tensorrt_10_and_11_are_taken(version: str, library_of: Path) -> None:
    (library_of / "tensorrt.py").write_text(f"__version__ = {version!r}")
    assert tensorrt_import.version("tensorrt") == version


def test_a_folder_of_type_stubs_is_no_library(library_of: Path) -> None:
    (library_of / "tensorrt").mkdir()
    (library_of / "tensorrt" / "__init__.pyi").touch()
    assert not tensorrt_import.is_installed("tensorrt")


@pytest.mark.tensorrt
def test_an_architecture_that_this_release_does_not_know_is_a_usage_error() -> None:
    if not tensorrt_import.is_installed("tensorrt-rtx"):
        pytest.skip("no TensorRT for RTX")
    with pytest.raises(UsageError, match="does not build for sm90"):
        tensorrt_import.set_architectures(None, ["sm89", "sm90"])


def test_no_other_module_imports_the_libraries() -> None:
    """Not even inside a function; what only mypy reads is allowed."""
    wrong = []
    for folder in ("sparse_export", "train", "cli", "models"):
        for path in (CHECKOUT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text())
            for_types = {
                id(inner)
                for node in ast.walk(tree)
                if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
                for statement in node.body
                for inner in ast.walk(statement)
            }
            for node in ast.walk(tree):
                if id(node) in for_types:
                    continue
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                wrong += [f"{path}: {name}" for name in names if name.partition(".")[0] in LIBRARIES]
    assert wrong == []
