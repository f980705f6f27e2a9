"""Six files of a bundle, changed in eleven ways each: none is used."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sparse_export.errors import SparseExportError
from sparse_export.formats.bundle import open_bundle
from sparse_export.formats.run import open_run
from sparse_export.serving.repository import open_served
from tests.serving.conftest import Bundles
from tests.serving.engines import with_engines

ENGINE = "tensorrt-fp16-sm90.engine"
FILES = (
    "manifest.json",
    "model.onnx",
    "layers.json",
    "golden/input.npy",
    "golden/output.npy",
    f"engines/{ENGINE}",
)


def _flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def _replaced_by(file: Path, make: Callable[[Path], object]) -> None:
    file.unlink()
    make(file)


def _linked(file: Path) -> None:
    aside = file.with_name(f"{file.name}.aside")
    file.rename(aside)
    file.symlink_to(aside)


WAYS: dict[str, Callable[[Path, Path], object]] = {
    "its first bit flipped": lambda file, other: _flip(file, 0),
    "a bit in its middle flipped": lambda file, other: _flip(file, file.stat().st_size // 2),
    "its last bit but one byte flipped": lambda file, other: _flip(file, -2),
    "cut by a byte": lambda file, other: os.truncate(file, file.stat().st_size - 2),
    "emptied": lambda file, other: os.truncate(file, 0),
    "longer": lambda file, other: file.write_bytes(file.read_bytes() + b"x"),
    "of another file": lambda file, other: file.write_bytes(other.read_bytes()),
    "a link": lambda file, other: _linked(file),
    "a pipe": lambda file, other: _replaced_by(file, os.mkfifo),
    "a folder": lambda file, other: _replaced_by(file, Path.mkdir),
    "gone": lambda file, other: file.unlink(),
}


@pytest.fixture(scope="module")
def whole(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_engines(bundles.dense, tmp_path_factory.mktemp("whole") / "b", ENGINE)


# The manifest may be reached by a link: what vouches for it is the digest of what was read.
@pytest.mark.parametrize(
    ("name", "way"),
    [(name, way) for name in FILES for way in WAYS if (name, way) != ("manifest.json", "a link")],
)
def test_a_bundle_with_a_file_that_was_changed_is_not_opened(
    name: str, way: str, whole: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "b"
    shutil.copytree(whole, bundle)
    open_bundle(bundle)
    WAYS[way](bundle / name, whole / FILES[FILES.index(name) - 1])
    for use in (open_bundle, open_served):
        with pytest.raises(SparseExportError):
            use(bundle)


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("file", ["manifest.json", "run.json"])
def test_no_single_flipped_bit_of_a_description_gives_it_another_meaning(
    file: str, bundles: Bundles, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """A thousand bits: each ends in an error, or is space between the words of JSON."""
    is_run = file == "run.json"
    folder = tmp_path / "changed"
    shutil.copytree(bundles.dense.with_name("dense-run") if is_run else bundles.dense, folder)
    whole = (folder / file).read_bytes()
    meant = (open_run if is_run else open_bundle)(folder).info
    bits = random.Random(request.config.getoption("--seed")).sample(range(8 * len(whole)), 1000)
    n_refused = 0
    for bit in bits:
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        (folder / file).write_bytes(changed)
        try:
            found = (open_run if is_run else open_bundle)(folder).info
        except SparseExportError:
            n_refused += 1
        else:
            assert found == meant, bit
    assert n_refused > 700
