"""Files that are exchanged while a bundle is packaged: what goes out is what the manifest lists, or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sparse_export.errors import SparseExportError
from sparse_export.serving.package import Package, package
from sparse_export.serving.repository import open_served
from tests.serving.conftest import Bundles
from tests.serving.engines import with_engines

ENGINE = "tensorrt-fp16-sm90.engine"

_swap: dict[str, Any] = {}


def _at_open(event: str, arguments: tuple[Any, ...]) -> None:
    """Exchange a file right before it is opened for the nth time."""
    if event != "open" or not _swap or not isinstance(arguments[0], str | bytes | os.PathLike):
        return
    if os.fsdecode(arguments[0]) == _swap["path"]:
        _swap["n"] += 1
        if _swap["n"] == _swap["at"]:
            Path(_swap["by"]).replace(_swap["path"])


sys.addaudithook(_at_open)


@contextmanager
def swapped(path: Path, by: Path, *, at: int) -> Iterator[None]:
    _swap.update(path=str(path), by=str(by), at=at, n=0)
    try:
        yield
    finally:
        _swap.clear()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json", f"engines/{ENGINE}"])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_file_that_is_exchanged_goes_out_under_no_hash_of_another(
    kind: str, name: str, bundles: Bundles, tmp_path: Path
) -> None:
    """Before, `model.onnx` was hashed and then opened again, and so was the manifest."""
    whole = with_engines(getattr(bundles, kind), tmp_path / "whole", ENGINE)
    alien = tmp_path / "alien"
    shutil.copytree(bundles.other, alien)
    (alien / "engines").mkdir()
    (alien / "engines" / ENGINE).write_bytes(b"another engine")
    wanted = packed_files(package([whole], ["m"], tmp_path / "plain"))
    for at in range(1, 6):
        bundle = tmp_path / f"b{at}"
        shutil.copytree(whole, bundle)
        with swapped(bundle / name, alien / name, at=at):
            try:
                made = package([bundle], ["m"], tmp_path / f"out{at}")
            except SparseExportError:
                continue
            finally:
                shutil.copytree(bundles.other, alien, dirs_exist_ok=True)
                (alien / "engines" / ENGINE).write_bytes(b"another engine")
        assert packed_files(made) == wanted
        assert {one.manifest_sha256 for one in made.models} == {digest(whole / "manifest.json")}


def packed_files(package: Package) -> dict[str, str]:
    """Digests of the models and engines of a package, by their path in it."""
    found = (*package.path.rglob("*.onnx"), *package.path.rglob("*.plan"))
    return {str(path.relative_to(package.path)): digest(path) for path in found}


def test_a_link_is_resolved_once(bundles: Bundles, tmp_path: Path) -> None:
    link = tmp_path / "b"
    link.symlink_to(bundles.dense)
    served = open_served(link)
    link.unlink()
    link.symlink_to(bundles.other)
    assert (served.name, served.bundle.path) == ("b", bundles.dense)
    assert served.bundle.onnx_path.read_bytes() == (bundles.dense / "model.onnx").read_bytes()
    assert served.manifest_sha256 == digest(bundles.dense / "manifest.json")


def test_the_digest_is_that_of_the_manifest_that_was_read(bundles: Bundles, tmp_path: Path) -> None:
    """Before, the file was hashed after it had been read, and could be another one."""
    bundle = tmp_path / "b"
    shutil.copytree(bundles.dense, bundle)
    served = open_served(bundle)
    right = digest(bundle / "manifest.json")
    document = json.loads((bundle / "manifest.json").read_bytes())
    (bundle / "manifest.json").write_text(json.dumps(document, indent=1))
    assert served.manifest_sha256 == right != digest(bundle / "manifest.json")
