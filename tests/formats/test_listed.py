"""Files of a run or a bundle are read only as listed, and only by one road."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from sparse_export.errors import ArtefactError
from sparse_export.formats.bundle import Bundle, open_bundle
from sparse_export.formats.listed import FileInfo, bytes_of, file_infos, file_of, listed_graph, verify_files
from sparse_export.inspect import inspect
from sparse_export.runtimes.choice import open_runtime
from tests.engines.conftest import small_graph
from tests.engines.making import bundle_info, engine_fact

CHECKOUT = Path(__file__).resolve().parents[2]
EMPTY = FileInfo(size_bytes=0, sha256=hashlib.sha256(b"").hexdigest())
Read = Callable[[Bundle, str], object]
READ: dict[str, Read] = {"file_of": file_of, "bytes_of": bytes_of}


def _bundle(folder: Path, *names: str) -> Bundle:
    """Of files with their names in them. names: those that are listed."""
    for name in ("model.onnx", "golden/input.npy"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return Bundle(path=folder, info=bundle_info(files=file_infos(folder, names)))


@pytest.mark.parametrize("read", READ.values(), ids=READ)
def test_a_file_that_is_not_listed_is_not_read(read: Read, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"manifest\.json lists no golden/input\.npy") as caught:
        read(_bundle(tmp_path, "model.onnx"), "golden/input.npy")
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("read", READ.values(), ids=READ)
@pytest.mark.parametrize("content", ["xodel.onnx", "short"])
def test_a_file_that_was_changed_since_it_was_opened_is_not_read(
    content: str, read: Read, tmp_path: Path
) -> None:
    bundle = _bundle(tmp_path, "model.onnx")
    (tmp_path / "model.onnx").write_text(content)
    with pytest.raises(ArtefactError, match=r"SHA-256 differs|has 5 bytes"):
        read(bundle, "model.onnx")


def test_what_is_listed_and_whole_is_read(tmp_path: Path) -> None:
    bundle = _bundle(tmp_path, "model.onnx", "golden/input.npy")
    assert file_of(bundle, "golden/input.npy") == tmp_path / "golden" / "input.npy"
    assert bytes_of(bundle, "golden/input.npy") == b"golden/input.npy"
    assert bundle.onnx_path == tmp_path / "model.onnx"


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "a/../x", "a/../../x"])
def test_a_name_that_climbs_is_refused_wherever_it_leads(name: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(ArtefactError, match="lies outside it"):
        verify_files(tmp_path, {name: EMPTY})


@pytest.mark.parametrize("name", ["", ".", "./x", "a//x", "a/", "a\\x", "x\0", "x\n", "\ud800", "x\u202e"])
def test_a_name_that_is_no_plain_path_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for file in ("x", "a/x"):
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(ArtefactError, match=r"which (has characters|is not a plain path)"):
        verify_files(tmp_path, {name: EMPTY})


@pytest.mark.parametrize(
    ("one", "other"),
    [("Model.onnx", "model.onnx"), ("caf\u00e9", "cafe\u0301"), ("stra\u00dfe", "STRASSE")],
)
def test_names_that_some_file_system_takes_for_one_are_refused(one: str, other: str, tmp_path: Path) -> None:
    for name in (one, other):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ArtefactError, match="which are one file"):
        verify_files(tmp_path, {one: EMPTY, other: EMPTY})


@pytest.mark.parametrize("link", ["x", "folder"])
def test_a_link_is_refused_also_within_the_folder(link: str, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_bytes(b"")
    (tmp_path / link).symlink_to(tmp_path / "real" / ("x" if link == "x" else ""))
    with pytest.raises(ArtefactError, match=f"{tmp_path / link} is a link"):
        verify_files(tmp_path, {"x" if link == "x" else "folder/x": EMPTY})


def test_the_folder_itself_may_be_reached_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_bytes(b"")
    (tmp_path / "link").symlink_to("real")
    verify_files(tmp_path / "link", {"x": EMPTY})


@pytest.mark.parametrize("kind", ["folder", "pipe", "long", "loop"])
def test_what_is_no_file_is_refused_and_not_waited_for(kind: str, tmp_path: Path) -> None:
    name = "x" * 300 if kind == "long" else "x"
    if kind == "folder":
        (tmp_path / name).mkdir()
    elif kind == "pipe":
        os.mkfifo(tmp_path / name)
    elif kind == "loop":
        (tmp_path / name).symlink_to(name)
    with pytest.raises(ArtefactError, match=r"is not a file|cannot be read|is a link"):
        verify_files(tmp_path, {name: EMPTY})


def test_a_manifest_that_lists_a_file_twice_is_not_read(tmp_path: Path) -> None:
    entry = '"model.onnx": {"size_bytes": 0, "sha256": ""}'
    (tmp_path / "manifest.json").write_text(
        f'{{"kind": "bundle", "schema_version": 1, "files": {{{entry}, {entry}}}}}'
    )
    with pytest.raises(ArtefactError, match=r"'model.onnx' comes twice in one object"):
        open_bundle(tmp_path)


def test_a_bundle_has_to_list_what_its_manifest_names_elsewhere() -> None:
    plain = ("model.onnx", "golden/input.npy", "golden/output.npy", "layers.json")
    assert bundle_info().required_files == plain
    engines = (engine_fact(file="a"), engine_fact(file="b", timing_cache="c"))
    assert bundle_info(engines=engines).required_files == (*plain, "a", "b", "c")


def _external(folder: Path) -> onnx.ModelProto:
    """Write a graph whose weights lie in `weights.bin`."""
    model = small_graph()
    for tensor in model.graph.initializer:  # small ones would stay in the graph
        tensor.CopyFrom(numpy_helper.from_array(np.ones_like(numpy_helper.to_array(tensor)), tensor.name))
    onnx.save(
        model, folder / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    return model


@pytest.mark.parametrize("listed", [True, False])
def test_external_data_of_a_graph_have_to_be_listed_too(listed: bool, tmp_path: Path) -> None:
    _external(tmp_path)
    files = file_infos(tmp_path, ["model.onnx", *(["weights.bin"] if listed else [])])
    bundle = Bundle(path=tmp_path, info=bundle_info(files=files))
    if listed:
        assert bundle.onnx_path.is_file()
        (tmp_path / "weights.bin").write_bytes(b"x")
        with pytest.raises(ArtefactError, match=r"weights\.bin has 1 bytes"):
            open_runtime(bundle, "onnxruntime-cpu")
    else:
        with pytest.raises(ArtefactError, match=r"lists no weights\.bin"):
            open_runtime(bundle, "onnxruntime-cpu")


@pytest.mark.parametrize("where", ["graph", "branch", "function"])
def test_a_graph_that_loads_an_engine_of_its_own_is_refused(where: str, tmp_path: Path) -> None:
    model = small_graph()
    node = onnx.helper.make_node("EPContext", ["input"], ["e"], domain="com.microsoft", ep_cache_context="x")
    if where == "graph":
        model.graph.node.append(node)
    elif where == "branch":
        branch = onnx.helper.make_graph([node], "branch", [], [])
        model.graph.node.append(onnx.helper.make_node("If", ["c"], ["o"], then_branch=branch))
    else:
        model.functions.append(onnx.helper.make_function("d", "f", ["input"], ["e"], [node], []))
    onnx.save(model, tmp_path / "model.onnx")
    files = file_infos(tmp_path, ["model.onnx"])
    with pytest.raises(ArtefactError, match="EPContext"):
        listed_graph(tmp_path, files, "model.onnx", described_by="manifest.json")


def test_an_engine_that_is_not_listed_is_told_by_inspect(tmp_path: Path) -> None:
    from sparse_export.formats.bundle import save_bundle_info
    from tests.engines.making import FILE, bundle_with_engine

    bundle = bundle_with_engine(tmp_path)
    assert inspect(tmp_path / FILE).problem is None
    save_bundle_info(tmp_path, replace(bundle.info, files={}))
    problem = inspect(tmp_path / FILE).problem
    assert problem is not None
    assert f"lists no {FILE}" in problem


# ---- the one road


def _opened_by_hand(path: Path) -> list[str]:
    """Expressions `….path / NAME` other than for a description of a folder and outside of messages."""
    tree = ast.parse(path.read_text())
    told = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    return [
        f"{path.relative_to(CHECKOUT)}:{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Div)
        and isinstance(node.left, ast.Attribute)
        and node.left.attr == "path"
        and ast.unparse(node.left) != "self.path"
        and not (isinstance(node.right, ast.Name) and node.right.id in ("RUN_FILE", "BUNDLE_FILE"))
        and id(node) not in told
    ]


def test_no_module_makes_the_path_of_a_file_of_a_run_or_a_bundle_by_itself() -> None:
    found = []
    for folder in ("sparse_export", "train", "cli"):
        for path in (CHECKOUT / folder).rglob("*.py"):
            if path.relative_to(CHECKOUT / folder).parts[0] not in ("train", "cli", "models"):
                found += _opened_by_hand(path)
    # The private folder of `serve`, which is neither.
    assert [one for one in found if "serving/process.py" not in one] == []


def test_the_look_for_such_a_module_finds_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.formats.test_listed.CHECKOUT", tmp_path)
    module = tmp_path / "module.py"
    module.write_text(
        'x = bundle.path / "model.onnx"\ny = f"{bundle.path / NAME}"\nz = run.path / RUN_FILE\n'
    )
    assert _opened_by_hand(module) == ["module.py:1: bundle.path / 'model.onnx'"]


def test_bundles_of_the_first_release_are_still_opened(tmp_path: Path) -> None:
    """Its manifests list these four files and have none of the later fields."""
    names = ("model.onnx", "layers.json", "golden/input.npy", "golden/output.npy")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    layer = {"name": "w", "shape": [1], "n_weights": 1, "n_active": 1, "masked": False}
    model = {"name": "small", "input_shape": [16], "n_classes": 8}
    document = {
        "method": "dense",
        "model": model,
        "data": None,
        "run": {"path": "run", "run_sha256": "0" * 64},
        "precision": "fp32",
        "targets": ["onnx"],
        "opset": 20,
        "ir_version": 10,
        "input_name": "input",
        "output_name": "logits",
        "density": 1.0,
        "layers": [layer],
        "n_parameters": 1,
        "n_nonzero": 1,
        "macs": 1,
        "nonzero_macs": 1,
        "accuracy": None,
        "atol": 1e-6,
        "rtol": 1e-3,
        "versions": {},
        "command": ["sparse-export", "build"],
        "created": "2026-01-01T00:00:00+00:00",
        "kind": "bundle",
        "schema_version": 1,
        "files": {name: {"size_bytes": 0, "sha256": EMPTY.sha256} for name in names},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    assert set(open_bundle(tmp_path).info.files) == set(names)
    shutil.rmtree(tmp_path / "golden")
    with pytest.raises(ArtefactError, match="is missing"):
        open_bundle(tmp_path)
