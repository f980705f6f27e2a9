"""Whatever a run or a bundle does not list is not used: every command refuses it with 6 and names the
file.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import Result
from onnx import numpy_helper

from sparse_export import trust
from sparse_export.building import build
from sparse_export.errors import ArtefactError
from sparse_export.files import sha256_file
from sparse_export.formats.bundle import (
    BUNDLE_FILE,
    CACHE_FOLDER,
    Bundle,
    open_bundle,
    read_bundle_info,
    save_bundle_info,
)
from sparse_export.formats.listed import file_infos
from sparse_export.formats.run import read_run_info, save_run_info
from tests.cli.conftest import Call
from tests.making_runs import digits_run

TIMING = ("--rounds", "20", "--threads", "1", "--batch", "1")
ENGINE = "engines/tensorrt-fp32-sm90.engine"


@dataclass(frozen=True)
class Honest:
    """A run and its bundle."""

    run: Path
    bundle: Path


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Honest:
    run = digits_run(tmp_path_factory.mktemp("honest") / "run", density=1.0)
    return Honest(run.path, build(run).path)


def _change(file: Path) -> None:
    """Into another file that can still be read: a graph of other weights, or a byte more at the end."""
    if file.suffix == ".onnx":
        model = onnx.load(file)
        bias = next(one for one in model.graph.initializer if one.name == "fc2.bias")
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 1, bias.name))
        onnx.save(model, file)
    else:
        file.write_bytes(file.read_bytes() + b"\n")


@pytest.fixture
def foreign(honest: Honest, tmp_path: Path) -> Callable[[str], Path]:
    """The bundle with another file in place of one, and none in its manifest; its user vouches for it."""

    def made(name: str) -> Path:
        folder = tmp_path / "bundle"
        shutil.copytree(honest.bundle, folder)
        _change(folder / name)
        info = read_bundle_info(folder)
        files = {listed: fact for listed, fact in info.files.items() if listed != name}
        save_bundle_info(folder, replace(info, files=files))
        trust.remember(sha256_file(folder / BUNDLE_FILE))
        return folder

    return made


@pytest.fixture
def foreign_run(honest: Honest, tmp_path: Path) -> Callable[[str], Path]:
    """The run without a file in its `run.json`."""

    def made(name: str) -> Path:
        folder = tmp_path / "run"
        shutil.copytree(honest.run, folder)
        info = read_run_info(folder)
        files = {listed: fact for listed, fact in info.files.items() if listed != name}
        save_run_info(folder, replace(info, files=files))
        return folder

    return made


def _refused(result: Result, name: str) -> None:
    assert result.exit_code == 6, result.output
    assert f"lists no {name}" in result.stderr


OF_BUNDLES: dict[str, Callable[[Path, Honest, Path], tuple[object, ...]]] = {
    "inspect": lambda bundle, honest, out: ("inspect", bundle),
    "bench": lambda bundle, honest, out: ("bench", bundle, *TIMING, "--runtime", "onnxruntime-cpu"),
    "compare, as the dense one": lambda bundle, honest, out: ("compare", bundle, honest.bundle, *TIMING),
    "compare, as the sparse one": lambda bundle, honest, out: ("compare", honest.bundle, bundle, *TIMING),
    "compare --html": lambda bundle, honest, out: ("compare", honest.bundle, bundle, *TIMING, "--html", out),
    "validate": lambda bundle, honest, out: ("validate", bundle),
    "validate --against": lambda bundle, honest, out: ("validate", honest.bundle, "--against", bundle),
    "gate": lambda bundle, honest, out: ("gate", bundle, "--against", honest.bundle),
    "gate --against": lambda bundle, honest, out: ("gate", honest.bundle, "--against", bundle),
    "package": lambda bundle, honest, out: ("package", bundle, "--out", out),
    "serve": lambda bundle, honest, out: ("serve", bundle),
}
OF_RUNS: dict[str, Callable[[Path, Path], tuple[object, ...]]] = {
    "inspect": lambda run, out: ("inspect", run),
    "build": lambda run, out: ("build", run, "--out", out),
    "train --resume": lambda run, out: ("train", "--resume", "--out", run),
    "sparsify": lambda run, out: ("sparsify", run, "--data", "none", "--out", out),
}


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve` starts none where it comes so far."""

    def fail() -> None:
        raise AssertionError("the bundle passed")

    monkeypatch.setattr(importlib.import_module("sparse_export.serving.supervise"), "find_server", fail)


@pytest.mark.usefixtures("no_server")
@pytest.mark.parametrize("command", OF_BUNDLES)
def test_a_model_that_the_manifest_does_not_list_is_used_by_no_command(
    command: str, foreign: Callable[[str], Path], honest: Honest, tmp_path: Path, call: Call
) -> None:
    words = OF_BUNDLES[command](foreign("model.onnx"), honest, tmp_path / "out")
    _refused(call(*words), "model.onnx")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["golden/input.npy", "golden/output.npy", "layers.json"])
@pytest.mark.parametrize("command", ["inspect", "validate", "gate --against", "package"])
def test_neither_are_the_other_files_that_every_bundle_has(
    name: str, command: str, foreign: Callable[[str], Path], honest: Honest, tmp_path: Path, call: Call
) -> None:
    _refused(call(*OF_BUNDLES[command](foreign(name), honest, tmp_path / "out")), name)


@pytest.mark.parametrize("name", ["model.safetensors", "masks.safetensors"])
@pytest.mark.parametrize("command", OF_RUNS)
def test_weights_and_masks_that_the_run_does_not_list_are_used_by_no_command(
    name: str, command: str, foreign_run: Callable[[str], Path], tmp_path: Path, call: Call
) -> None:
    _refused(call(*OF_RUNS[command](foreign_run(name), tmp_path / "out")), name)
    assert not (tmp_path / "out").exists()


def _with(folder: Path, **changes: Any) -> None:
    save_bundle_info(folder, replace(read_bundle_info(folder), **changes))


@pytest.mark.parametrize("command", ["inspect", "bench", "validate", "gate", "package"])
@pytest.mark.parametrize("missing", [ENGINE, "engines/tensorrt.timing.cache"])
def test_an_engine_and_its_timing_cache_have_to_be_listed_where_the_manifest_names_them(
    missing: str, command: str, honest: Honest, tmp_path: Path, call: Call
) -> None:
    from tests.engines.making import engine_fact

    folder, cache = tmp_path / "bundle", "engines/tensorrt.timing.cache"
    shutil.copytree(honest.bundle, folder)
    (folder / "engines").mkdir()
    for name in (ENGINE, cache):
        (folder / name).write_bytes(b"x")
    listed = file_infos(folder, {ENGINE, cache} - {missing})
    files = read_bundle_info(folder).files | listed
    engines = (engine_fact(file=ENGINE, target="tensorrt", timing_cache=cache),)
    _with(folder, files=files, engines=engines)
    _refused(call(*OF_BUNDLES[command](folder, honest, tmp_path / "out")), missing)


def test_a_file_that_is_only_in_the_folder_is_told_by_inspect_in_one_line_and_is_no_error(
    honest: Honest, tmp_path: Path, call: Call
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(honest.bundle, folder)
    (folder / "model-dense.onnx").write_bytes(b"foreign")
    cache = folder / CACHE_FOLDER / "x"
    cache.parent.mkdir(parents=True)
    cache.write_bytes(b"left by a session")
    result = call("inspect", folder)
    assert result.exit_code == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("not listed")]
    assert line.split(maxsplit=2)[2] == "model-dense.onnx: in the folder, not in the manifest, and not used"
    assert "not listed" not in call("inspect", honest.bundle).stdout


@pytest.mark.parametrize("command", ["inspect", "bench", "validate", "gate", "package"])
def test_external_data_that_are_not_listed_are_used_by_no_command(
    command: str, honest: Honest, tmp_path: Path, call: Call
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(honest.bundle, folder)
    model = onnx.load(folder / "model.onnx")
    graph = folder / "model.onnx"
    onnx.save(model, graph, save_as_external_data=True, location="weights.bin", size_threshold=0)
    files = file_infos(folder, read_bundle_info(folder).files)
    _with(folder, files=files)
    trust.remember(sha256_file(folder / BUNDLE_FILE))
    result = call(*OF_BUNDLES[command](folder, honest, tmp_path / "out"))
    _refused(result, "weights.bin")


def test_a_dense_model_that_is_not_listed_is_not_packaged(honest: Honest, tmp_path: Path, call: Call) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(honest.bundle, folder)
    (folder / "model-dense.onnx").write_bytes(b"foreign")
    out = tmp_path / "out"
    result = call("package", folder, "--runtime", "onnxruntime", "--out", out)
    assert result.exit_code == 0, result.stderr
    packaged = out / "model_repository" / "bundle" / "1" / "model.onnx"
    assert sha256_file(packaged) == read_bundle_info(folder).files["model.onnx"].sha256


def test_a_report_shows_no_bundle_that_was_changed_since_it_was_compared(
    honest: Honest, tmp_path: Path
) -> None:
    from sparse_export.report.side import side_of

    folder = tmp_path / "bundle"
    shutil.copytree(honest.bundle, folder)
    bundle: Bundle = open_bundle(folder)
    _change(folder / "model.onnx")
    with pytest.raises(ArtefactError, match=r"model\.onnx is not the file that was written"):
        side_of("dense", bundle)
