"""A bundle with engines: what is in it, what is told of it, and what happens when one cannot be built."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparse_export import trust
from sparse_export.building import build
from sparse_export.engines.options import EngineOptions
from sparse_export.errors import EngineBuildFailed, MissingCapability, UsageError
from sparse_export.files import sha256_file
from sparse_export.formats.bundle import Bundle, open_bundle
from sparse_export.formats.run import Run
from tests.cli.conftest import Call
from tests.exporting import exported_once
from tests.making_runs import digits_run

pytestmark = [pytest.mark.tensorrt, pytest.mark.usefixtures("rtx")]
ENGINE = "engines/tensorrt-rtx-fp32-default.engine"


@pytest.fixture(scope="module", autouse=True)
def _exported_once() -> Iterator[None]:
    with exported_once():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return digits_run(tmp_path_factory.mktemp("engines") / "run")


@pytest.fixture(scope="module")
def bundle(run: Run, rtx: None) -> Bundle:
    return build(run.path, targets=["onnx", "tensorrt-rtx"])


def test_the_engine_is_listed_with_its_hash_and_what_it_is_for(bundle: Bundle) -> None:
    info = open_bundle(bundle.path).info
    assert info.targets == ("onnx", "tensorrt-rtx")
    (fact,) = info.engines
    assert (fact.file, fact.target, fact.profiles) == (ENGINE, "tensorrt-rtx", ({"batch": (1, 8, 32)},))
    assert info.files[ENGINE].sha256 == sha256_file(bundle.path / ENGINE)
    assert {ENGINE, f"{ENGINE}.log"} <= info.files.keys()


def test_every_layer_has_a_state_for_the_engine_and_none_is_picked(bundle: Bundle) -> None:
    document = json.loads((bundle.path / "layers.json").read_text())
    rows = document["engines"][ENGINE]
    assert [row["node"] for row in rows] == [layer["node"] for layer in document["layers"]]
    assert {row["state"] for row in rows} <= {"not eligible", "unknown", "unproven"}
    assert all(row["text"] for row in rows)


def test_a_bundle_that_this_user_built_is_trusted_and_another_is_not(bundle: Bundle) -> None:
    manifest = bundle.path / "manifest.json"
    assert trust.is_trusted(sha256_file(manifest))
    assert not trust.is_trusted("0" * 64)


def test_a_target_that_is_not_here_ends_with_5_and_the_others_are_built(
    run: Run, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out = tmp_path / "bundle"
    result = call(
        "build", str(run.path), "--out", str(out), "--target", "tensorrt", "--target", "tensorrt-rtx"
    )
    assert result.exit_code == 5
    assert "Installation Guide" in result.stderr
    assert f"The bundle {out} has all the other targets" in " ".join(result.stderr.split())
    info = open_bundle(out).info
    assert info.targets == ("onnx", "tensorrt-rtx")
    assert ENGINE in info.files


def test_a_crash_costs_nothing_else(run: Run, stand_in: Path, tmp_path: Path) -> None:
    stand_in.write_text(f"import os\n{stand_in.read_text()}def OnnxParser(*_): os.abort()\n")
    out = tmp_path / "bundle"
    with pytest.raises(EngineBuildFailed, match="SIGABRT"):
        build(run.path, out, targets=["tensorrt", "tensorrt-rtx"])
    assert open_bundle(out).info.targets == ("onnx", "tensorrt-rtx")
    assert (tmp_path / "bundle-tensorrt-failed" / "repeat.sh").is_file()


def test_the_timing_cache_of_ones_own_bundle_is_taken_up(run: Run, stand_in: Path, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    stand_in.write_text(
        f"{stand_in.read_text()}"
        "_create = IBuilderConfig.create_timing_cache\n"
        "def _noted(self, content):\n"
        f"    open({str(seen)!r}, 'a').write(f'{{len(content)}} ')\n"
        "    return _create(self, content)\n"
        "IBuilderConfig.create_timing_cache = _noted\n"
    )
    out = tmp_path / "bundle"
    first = build(run.path, out, targets=["tensorrt"])
    (fact,) = first.info.engines
    assert fact.timing_cache is not None
    size = first.info.files[fact.timing_cache].size_bytes
    build(run.path, out, targets=["tensorrt"])
    (out / fact.timing_cache).write_bytes(os.urandom(size))
    build(run.path, out, targets=["tensorrt"])
    assert seen.read_text().split() == ["0", str(size), "0"]  # none yet, the first one's, a changed one


def test_options_for_a_target_that_is_not_built_are_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="options for tensorrt-rtx"):
        build(run.path, tmp_path / "x", engines=[EngineOptions(target="tensorrt-rtx")])


def test_the_command_tells_of_the_engine(run: Run, tmp_path: Path, call: Call) -> None:
    words = ("--target", "tensorrt-rtx", "--gpu-arch", "sm120,sm89", "--profile", "1:1:4", "--profile", "8")
    result = call("build", str(run.path), "--out", str(tmp_path / "b"), *words)
    assert result.exit_code == 0
    assert "engines/tensorrt-rtx-fp32-sm89+sm120.engine" in result.stdout
    (fact,) = open_bundle(tmp_path / "b").info.engines
    assert (fact.architectures, fact.profiles) == (
        ("sm89", "sm120"),
        ({"batch": (1, 1, 4)}, {"batch": (8, 8, 8)}),
    )
    assert (
        "Triton cannot serve an engine of tensorrt-rtx: `serve` and `package` use the ONNX file"
        in result.stdout
    )


def test_a_dry_run_writes_nothing_and_says_what_is_missing(
    run: Run, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sparse_export.engines.tensorrt_import.is_installed", lambda target: target != "tensorrt"
    )
    out = tmp_path / "b"
    words = ("--target", "tensorrt", "--target", "tensorrt-rtx", "--dry-run")
    result = call("build", str(run.path), "--out", str(out), *words)
    assert result.exit_code == 0
    assert "not installed" in result.stdout
    assert ENGINE in result.stdout
    assert not out.exists()
    document = json.loads(call("build", str(run.path), "--out", str(out), *words, "--json").stdout)
    problems = {one["file"]: one["problem"] for one in document["files"]}
    assert problems["model.onnx"] is None
    assert problems[ENGINE] is None
    assert "not installed" in problems["engines/tensorrt-fp32-default.engine"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--target", "tensorrt-rtx", "--precision", "fp8", "--gpu-arch", "sm80"), "no fp8 arithmetic"),
        (("--target", "tensorrt-rtx", "--gpu-arch", "sm90"), "does not build for sm90"),
        (("--target", "onnx", "--time-layers"), "no engine is built"),
        (("--target", "tensorrtx"), "tensorrt-rtx"),
        (("--max-cut", "0.1"), "no pattern"),
        (("--pattern", "2:4", "--out", "."), "not a bundle"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, tuple) else "",
)
def test_a_dry_run_ends_as_the_build_would(
    words: tuple[str, ...], said: str, run: Run, tmp_path: Path, call: Call
) -> None:
    out = () if "--out" in words else ("--out", tmp_path / "b")
    wanted, found = (call("build", run.path, *out, *words, *dry) for dry in ((), ("--dry-run",)))
    assert (wanted.exit_code, found.exit_code) == (2, 2)
    assert said in found.stderr
    assert found.stderr == wanted.stderr
    assert not (tmp_path / "b").exists()


def test_a_dry_run_tells_of_timing_and_what_that_needs(
    run: Run, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("build", run.path, "--out", tmp_path / "b", "--target", "tensorrt-rtx", "--time-layers")
    monkeypatch.setattr("sparse_export.engines.tensorrt_import.gpu", lambda: None)
    assert call(*words, "--dry-run").exit_code == call(*words).exit_code == 5
    monkeypatch.setattr("sparse_export.building.request.require_timeable", lambda options: None)
    told = call(*words, "--dry-run")
    assert told.exit_code == 0
    assert "each layer timed" in told.stdout


def test_a_dry_run_of_nothing_is_an_error(tmp_path: Path, call: Call) -> None:
    assert call("build", str(tmp_path / "none"), "--dry-run").exit_code == 2


def test_missing_capability_is_what_the_library_raises_too(run: Run, tmp_path: Path) -> None:
    from sparse_export.engines import tensorrt_import

    if tensorrt_import.is_installed("tensorrt"):
        pytest.skip("TensorRT is here")
    with pytest.raises(MissingCapability, match=r"\.\[tensorrt\]"):
        build(run.path, tmp_path / "b", targets=["tensorrt"])
    assert open_bundle(tmp_path / "b").info.targets == ("onnx",)
