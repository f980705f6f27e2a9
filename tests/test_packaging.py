"""The package is whole, light to import, and its modules import only downward."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparse_export

CHECKOUT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
# Folder of the checkout -> name of its package.
ROOTS = {
    "sparse_export": "sparse_export",
    "train": "sparse_export.train",
    "cli": "sparse_export.cli",
    "models": "sparse_export.models",
}
LINKS = ("train", "cli", "models")

# Room -> floor. A module imports from lower floors and from its own room, nothing else. docs/architecture.md
# has the same.
FLOORS = {
    "errors": 0,
    "signature": 1,
    "version": 0,
    "telemetry": 0,
    "onnxruntime_import": 1,
    "files": 1,
    "child": 2,
    "tables": 1,
    "instruments": 1,
    "pages": 2,
    "sparsity": 1,
    "formats": 2,
    "own_code": 1,
    "trust": 2,
    "graph": 3,
    "tasks": 3,
    "engines": 4,
    "models": 4,
    "runtimes": 5,
    "train": 5,
    "oneshot": 6,
    "building": 7,
    "inspection": 7,
    "evaluate": 8,
    "inspect": 8,
    "doctor": 9,
    "plan": 9,
    "report": 9,
    "serving": 9,
    "sweep": 9,
    "cli": 10,
    "__main__": 11,
}

# Imports inside functions: they keep `--help` quick, and optional libraries out of the way. No more without a
# reason.
MOST_LOCAL_IMPORTS = 34


def _packages() -> Iterator[str]:
    """Every folder with Python in it, by the package name that it has to have."""
    for folder, package in ROOTS.items():
        for path in (CHECKOUT / folder).rglob("*.py"):
            below = path.parent.relative_to(CHECKOUT / folder).parts
            if below and folder == "sparse_export" and below[0] in LINKS:
                continue
            yield ".".join((package, *below))


def _modules() -> Iterator[tuple[str, Path]]:
    """Every module by its full name."""
    for folder, package in ROOTS.items():
        for path in sorted((CHECKOUT / folder).rglob("*.py")):
            below = path.relative_to(CHECKOUT / folder).with_suffix("").parts
            if folder == "sparse_export" and below[0] in LINKS:
                continue
            yield ".".join((package, *(part for part in below if part != "__init__"))), path


def _imports(path: Path) -> Iterator[str]:
    """Full names of what a module imports from sparse_export, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _room(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "sparse_export" and len(parts) > 1 else None


def test_every_folder_with_python_is_in_the_list_of_packages() -> None:
    assert set(SETUPTOOLS["packages"]) == set(_packages())


def test_every_package_folder_has_an_init() -> None:
    homes = {package: CHECKOUT / folder for folder, package in ROOTS.items()}
    for name in SETUPTOOLS["packages"]:
        root = max((root for root in homes if name == root or name.startswith(f"{root}.")), key=len)
        folder = homes[root].joinpath(*name.removeprefix(root).split(".")[1:])
        assert (folder / "__init__.py").is_file(), name


def test_the_four_folders_are_mapped_to_one_package() -> None:
    assert SETUPTOOLS["package-dir"] == {package: folder for folder, package in ROOTS.items()}


@pytest.mark.parametrize("name", LINKS)
def test_the_links_point_to_the_top_level_folders(name: str) -> None:
    link = CHECKOUT / "sparse_export" / name
    assert (link.is_symlink(), os.fspath(link.readlink())) == (True, f"../{name}")


def test_the_licence_named_is_the_licence_there() -> None:
    assert PROJECT["project"]["license"] == "Apache-2.0"
    text = (CHECKOUT / "LICENSE").read_text()
    assert "Apache License" in text
    assert text.rstrip().endswith("limitations under the License.")


def test_constraints_pin_every_direct_dependency() -> None:
    lines = (CHECKOUT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    project = PROJECT["project"]
    wanted = [
        *project["dependencies"],
        *(w for e in ("test", "dev") for w in project["optional-dependencies"][e]),
    ]
    names = {re.split(r"[;>\[]", w)[0].strip().lower() for w in wanted if "linux' or" not in w}
    assert names - pinned == {"sparse-export"}  # dev takes test along


def test_a_copy_of_the_checkout_runs_without_installation(tmp_path: Path) -> None:
    for folder in ROOTS:
        shutil.copytree(
            CHECKOUT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words: str) -> str:
        return subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout

    assert (
        run("-m", "sparse_export", "--version").splitlines()[0]
        == f"sparse-export {sparse_export.__version__}"
    )
    home = run("-c", "import sparse_export.cli.main as m; print(m.__file__)").strip()
    assert Path(home).is_relative_to(tmp_path)


def test_importing_the_package_loads_no_heavy_library() -> None:
    probe = (
        "import sys, sparse_export, sparse_export.errors\n"
        "dir(sparse_export)\n"
        "found = {'numpy'} & set(sys.modules)\n"
        "import sparse_export.formats.bundle, sparse_export.formats.layers\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'sklearn', 'pydantic'}\n"
        "print(sorted(found | heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=CHECKOUT, check=True, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", sparse_export.__all__)
def test_every_public_name_is_the_same_thing_whatever_was_imported_before(name: str) -> None:
    first = getattr(sparse_export, name)
    importlib.import_module(f"{first.__module__}")
    assert getattr(sparse_export, name) is first
    assert first.__name__ == name


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(sparse_export, "no_such_name")  # noqa: B009 - mypy knows that the plain form is wrong


def test_every_room_has_a_floor() -> None:
    assert {_room(name) for name, _ in _modules()} - {None} == set(FLOORS)


def test_rooms_import_from_lower_floors_only() -> None:
    wrong = []
    for name, path in _modules():
        here = _room(name)
        if here is None:  # the package itself, which hands its names out lazily
            continue
        for imported in _imports(path):
            there = _room(imported)
            if there not in (None, here) and there in FLOORS and FLOORS[there] >= FLOORS[here]:
                wrong.append(f"{name} imports {imported}")
    assert wrong == []


def _circles() -> set[frozenset[str]]:
    """Modules that import each other, directly or not; imports in functions and for types count."""
    names = {name for name, _ in _modules()}

    def module_of(imported: str) -> str | None:
        return next((name for name in (imported, imported.rpartition(".")[0]) if name in names), None)

    reached = {
        name: {found for imported in _imports(path) if (found := module_of(imported)) is not None}
        for name, path in _modules()
    }
    for through in names:
        for below in reached.values():
            if through in below:
                below |= reached[through]
    return {
        frozenset(other for other in below if name in reached[other])
        for name, below in reached.items()
        if name in below
    }


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert [sorted(circle) for circle in _circles()] == []


def _local_imports(path: Path) -> int:
    """How many import statements of a module for this package stand inside functions, those for types left
    out.
    """
    nodes = [
        node
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparse_export")
    ]
    return len({id(node) for node in nodes})


def test_imports_inside_functions_are_counted_and_become_no_more() -> None:
    """Commands import their stage when they run, so cli/ is not counted."""
    counts = {name: _local_imports(path) for name, path in _modules() if ".cli." not in name}
    assert sum(counts.values()) <= MOST_LOCAL_IMPORTS, {name: n for name, n in counts.items() if n}


@pytest.mark.parametrize("name", [name for name, _ in _modules() if not name.endswith("__main__")])
def test_every_module_can_be_imported(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no sentence that says what it is for"
