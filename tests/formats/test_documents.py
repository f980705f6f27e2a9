"""Runs and bundles on disk: what is written is read, and what was changed is noticed."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import torch

import sparse_export
from sparse_export.errors import ArtefactError, SparseExportError, UsageError
from sparse_export.formats.bundle import (
    BundleInfo,
    GoldenInfo,
    RunReference,
    open_bundle,
    read_bundle_info,
    save_bundle_info,
)
from sparse_export.formats.document import SEALED_VERSION
from sparse_export.formats.layers import GraphLayer
from sparse_export.formats.listed import FileInfo, file_infos, verify_files
from sparse_export.formats.run import (
    DataInfo,
    LayerInfo,
    ModelInfo,
    RunInfo,
    open_run,
    read_run_info,
    save_run_info,
)
from sparse_export.formats.score import Score
from sparse_export.signature import class_signature
from sparse_export.version import command_line, library_versions, now
from tests.sealing import first_version, write_sealed

MODEL = ModelInfo(name="digits-cnn")
SIGNATURE = class_signature((1, 8, 8), 10)
DATA = DataInfo(
    name="digits", mean=(0.1,), std=(0.2,), n_train=9, n_validation=1, n_test=2, test_sha256="0" * 64
)
LAYERS = (LayerInfo(name="fc.weight", shape=(4, 5), n_weights=20, n_active=5, masked=True),)
COMMON: dict[str, Any] = {
    "method": "sparse-momentum",
    "model": MODEL,
    "signature": SIGNATURE,
    "data": DATA,
    "density": 0.25,
    "layers": LAYERS,
    "n_parameters": 24,
    "versions": {"python": "3.11"},
    "command": ("sparse-export", "train"),
    "created": "2026-01-01T00:00:00+00:00",
}


def _save_run(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "masks.safetensors").write_bytes(b"masks")
    info = RunInfo(
        **COMMON,
        status="complete",
        target_density=0.25,
        n_active=5,
        n_masked=20,
        validation=None,
        test=Score(n_correct=1, n_samples=2),
        seed=0,
        n_threads=1,
        device="cpu",
        epochs=2,
        n_steps=10,
        seconds=1.5,
        recipe={"epochs": 2, "nested": {"density": 0.25}},
        files=file_infos(folder, ["model.safetensors", "masks.safetensors"]),
    )
    save_run_info(folder, info)


def _save_bundle(folder: Path) -> None:
    (folder / "golden").mkdir(parents=True)
    names = ("model.onnx", "golden/input.npy", "golden/output.npy", "layers.json")
    for name in names:
        (folder / name).write_bytes(b"content")
    info = BundleInfo(
        **COMMON,
        run=RunReference(path="run", run_sha256="1" * 64),
        precision="fp32",
        targets=("onnx",),
        opset=20,
        ir_version=10,
        golden=GoldenInfo(
            inputs={"input": "golden/input.npy"}, outputs={"logits": "golden/output.npy"}, inner={}
        ),
        n_nonzero=9,
        macs=20,
        nonzero_macs=None,
        score=None,
        atol=1e-4,
        rtol=1e-4,
        files=file_infos(folder, names),
    )
    save_bundle_info(folder, info)


SAVE: dict[str, Callable[[Path], None]] = {"run.json": _save_run, "manifest.json": _save_bundle}
OPEN: dict[str, Callable[[Path], Any]] = {"run.json": open_run, "manifest.json": open_bundle}


@pytest.fixture(params=list(SAVE))
def described(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The description of a run or of a bundle, in a good folder."""
    SAVE[request.param](tmp_path / "folder")
    return tmp_path / "folder" / str(request.param)


def _open(described: Path) -> Any:
    return OPEN[described.name](described.parent)


def _change(described: Path, **changes: Any) -> None:
    write_sealed(described, json.loads(described.read_text()) | changes)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    _save_run(tmp_path / "run")
    info = open_run(tmp_path / "run").info
    assert info == read_run_info(tmp_path / "run")
    assert (info.model, info.data, info.layers, info.status) == (MODEL, DATA, LAYERS, "complete")
    assert info.recipe == {"epochs": 2, "nested": {"density": 0.25}}


def test_a_bundle_that_is_written_is_read(tmp_path: Path) -> None:
    _save_bundle(tmp_path / "bundle")
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.info == read_bundle_info(tmp_path / "bundle")
    assert (bundle.info.layers, bundle.info.nonzero_macs) == (LAYERS, None)
    assert bundle.onnx_path == tmp_path / "bundle" / "model.onnx"


def test_sha256sums_lists_every_file_of_a_bundle_and_its_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    _save_bundle(folder)
    pairs = (line.split("  ") for line in (folder / "SHA256SUMS").read_text().splitlines())
    lines = {name: digest for digest, name in pairs}
    assert lines == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("manifest.json", "model.onnx", "golden/input.npy", "golden/output.npy", "layers.json")
    }


def test_a_folder_that_was_moved_is_still_whole(described: Path, tmp_path: Path) -> None:
    moved = described.parent.rename(tmp_path / "elsewhere")
    assert _open(moved / described.name).path == moved


def test_a_folder_that_is_not_there_is_wrong_usage(described: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        _open(described.parent / "nothing" / described.name)


def test_a_folder_without_description_is_told_what_made_it(described: Path) -> None:
    described.unlink()
    with pytest.raises(ArtefactError, match=f"holds no {described.name}.*sparse-export (train|build)"):
        _open(described)


@pytest.mark.parametrize(
    "text", ["", "{", "not json", "[" * 100_000, '{"kind": "run"', "\x00"], ids=lambda text: repr(text[:8])
)
def test_garbage_is_not_json(described: Path, text: str) -> None:
    described.write_text(text)
    with pytest.raises(ArtefactError, match="is not JSON"):
        _open(described)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_has_not_are_not_read(described: Path, number: str) -> None:
    described.write_text(described.read_text().replace('"density": 0.25', f'"density": {number}', 1))
    with pytest.raises(ArtefactError, match=f"is not JSON: {number} is not a number"):
        _open(described)


def test_a_description_that_the_system_does_not_give_is_told(
    described: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ArtefactError, match=f"{described} cannot be read: Permission denied"):
        _open(described)


@pytest.mark.parametrize(("n_correct", "n_samples"), [(0, 0), (-1, 2), (3, 2), (0, -1)])
def test_an_accuracy_that_cannot_be_is_not_read(described: Path, n_correct: int, n_samples: int) -> None:
    key = "test" if described.name == "run.json" else "score"
    _change(described, **{key: {"n_correct": n_correct, "n_samples": n_samples}})
    with pytest.raises(ArtefactError, match=f"damaged at '{key}.*(right answers among|greater than)"):
        _open(described)


def test_bytes_that_are_not_text_are_not_json(described: Path) -> None:
    described.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtefactError, match="is not JSON"):
        _open(described)


@pytest.mark.parametrize("kind", ["engine", None, 3])
def test_another_kind_is_refused(described: Path, kind: object) -> None:
    _change(described, kind=kind)
    with pytest.raises(ArtefactError, match=f"describes {kind!r}"):
        _open(described)


@pytest.mark.parametrize("document", [[], 3, "run", None])
def test_json_that_is_no_object_is_refused(described: Path, document: object) -> None:
    described.write_text(json.dumps(document))
    with pytest.raises(ArtefactError, match="describes None"):
        _open(described)


@pytest.mark.parametrize("version", [SEALED_VERSION + 1, "1", None, 1.5])
def test_a_newer_schema_names_both_versions(described: Path, version: object) -> None:
    _change(described, schema_version=version)
    with pytest.raises(ArtefactError, match=f"up to {SEALED_VERSION}.*newer sparse-export") as caught:
        _open(described)
    assert repr(version) in str(caught.value)


def test_a_damaged_field_is_named(described: Path) -> None:
    _change(described, model={"name": "x", "form": "square"})
    with pytest.raises(ArtefactError, match=r"damaged at 'model\.form'"):
        _open(described)


def test_a_missing_field_is_named(described: Path) -> None:
    document = json.loads(described.read_text())
    del document["layers"]
    write_sealed(described, document)
    with pytest.raises(ArtefactError, match="damaged at 'layers'"):
        _open(described)


def test_a_run_that_is_not_finished_says_how_to_go_on(tmp_path: Path) -> None:
    _save_run(tmp_path / "run")
    info = dataclasses.replace(read_run_info(tmp_path / "run"), status="running")
    save_run_info(tmp_path / "run", info)
    with pytest.raises(ArtefactError, match="train --resume"):
        open_run(tmp_path / "run")
    assert read_run_info(tmp_path / "run").status == "running"


def _listed(described: Path) -> Path:
    return described.parent / ("model.onnx" if described.name == "manifest.json" else "model.safetensors")


def test_a_listed_file_that_is_missing_is_named(described: Path) -> None:
    _listed(described).unlink()
    with pytest.raises(ArtefactError, match=f"{_listed(described)} is missing"):
        _open(described)


def test_a_truncated_file_is_told_both_sizes(described: Path) -> None:
    size = _listed(described).stat().st_size
    _listed(described).write_bytes(b"x")
    with pytest.raises(ArtefactError, match=f"has 1 bytes.*{size} were written"):
        _open(described)


def test_a_changed_byte_is_noticed(described: Path) -> None:
    content = bytearray(_listed(described).read_bytes())
    content[0] ^= 1
    _listed(described).write_bytes(content)
    with pytest.raises(ArtefactError, match="SHA-256 differs"):
        _open(described)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside"])
def test_a_listed_path_outside_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "outside").write_bytes(b"")
    fact = FileInfo(size_bytes=0, sha256=hashlib.sha256(b"").hexdigest())
    with pytest.raises(ArtefactError, match="lies outside it"):
        verify_files(folder, {name: fact})


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "outside").write_bytes(b"")
    (folder / "inside").symlink_to(tmp_path / "outside")
    with pytest.raises(ArtefactError, match="lies outside it"):
        verify_files(folder, file_infos(folder, ["inside"]))


def test_every_artefact_error_ends_with_six(described: Path) -> None:
    described.write_text("")
    with pytest.raises(SparseExportError) as caught:
        _open(described)
    assert caught.value.exit_code == 6


def test_density_and_accuracy_are_computed_from_counts() -> None:
    assert LAYERS[0].density == 0.25
    assert Score(n_correct=1, n_samples=8).figure == 12.5


def test_versions_name_ourselves_python_and_torch() -> None:
    versions = library_versions()
    assert versions["sparse-export"] == sparse_export.__version__
    assert {"python", "torch", "onnx", "numpy"} <= versions.keys()


def test_the_command_line_starts_with_the_program_and_not_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/local/bin/sparse-export", "train", "digits"])
    assert command_line() == ("sparse-export", "train", "digits")


def test_times_are_utc_to_the_second() -> None:
    assert now().endswith("+00:00")
    assert "." not in now()


@pytest.mark.parametrize(("file", "cls"), [("run.json", RunInfo), ("manifest.json", BundleInfo)])
def test_the_document_explains_every_field(file: str, cls: type[RunInfo | BundleInfo]) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "artefacts.md").read_text()
    section = text.partition(f"### `{file}`")[2].partition("\n#")[0]
    told = {
        word
        for row in section.splitlines()
        if row.startswith("| `")
        for word in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    assert told == {field.name for field in dataclasses.fields(cls)}


def test_layers_written_before_patterns_were_told_can_still_be_read() -> None:
    old = {
        "node": "n",
        "op_type": "Conv",
        "weight": "w",
        "shape": [4, 4, 1, 1],
        "reduction_axis": 1,
        "n_weights": 16,
        "n_nonzero": 8,
        "macs": None,
        "nonzero_macs": None,
    }
    layer = pydantic.TypeAdapter(GraphLayer).validate_python(old)
    assert (layer.constant, layer.pattern_holds, layer.eligible, layer.reasons) == (
        True,
        None,
        "unproven",
        (),
    )
    assert pydantic.TypeAdapter(GraphLayer).validate_python(dataclasses.asdict(layer)) == layer


@pytest.mark.parametrize("counts", [(97.75, 100), (0.93, 1), (3, 4.0), ("3", 4)])
def test_an_accuracy_of_something_that_is_not_counted_is_refused(counts: tuple[Any, Any]) -> None:
    with pytest.raises(UsageError, match=r"_(correct|samples) of a score is .*count of samples"):
        Score(n_correct=counts[0], n_samples=counts[1])


def test_an_accuracy_takes_the_counts_of_arrays_and_tensors() -> None:
    found = Score(n_correct=torch.tensor([True, False]).sum(), n_samples=np.int64(2))  # type: ignore[arg-type]
    assert (found, type(found.n_correct), type(found.n_samples)) == (
        Score(n_correct=1, n_samples=2),
        int,
        int,
    )


def test_no_flipped_bit_of_a_description_is_taken_for_a_fact(described: Path) -> None:
    """All of 1 in 7 of its bits: each ends in an error, or is space between the words of JSON."""
    whole = described.read_bytes()
    said = json.loads(whole)
    for bit in range(0, 8 * len(whole), 7):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        described.write_bytes(bytes(changed))
        try:
            _open(described)
        except SparseExportError:
            continue
        assert json.loads(changed) == said


@pytest.mark.parametrize(
    ("field", "value"),
    [("density", 1.5), ("density", -0.1), ("n_parameters", -1), ("n_parameters", True), ("layers", "none")],
)
def test_what_is_out_of_range_is_not_read_though_it_is_sealed(
    described: Path, field: str, value: object
) -> None:
    _change(described, **{field: value})
    with pytest.raises(ArtefactError, match=f"damaged at '{field}"):
        _open(described)


def test_documents_of_the_first_version_are_read(described: Path) -> None:
    described.write_text(json.dumps(first_version(json.loads(described.read_text()))))
    info = _open(described).info
    names = ("x", "y") if described.name == "manifest.json" else ("input", "logits")
    assert info.signature == class_signature((1, 8, 8), 10, names=names)
    assert (info.model, info.task.name, info.schema_version) == (MODEL, "classification", SEALED_VERSION)
    if described.name == "manifest.json":
        assert info.golden.inputs == {"x": "golden/input.npy"}


def test_a_document_is_not_taken_for_one_of_the_first_version(described: Path) -> None:
    _change(described, schema_version=1)
    with pytest.raises(ArtefactError, match="is damaged: it lacks"):
        _open(described)
