"""What this user does not vouch for is opened and run by another process first, once."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from sparse_export import trust
from sparse_export.child import ChildError
from sparse_export.errors import ArtefactError, MissingCapability, OutputError, SparseExportError
from sparse_export.files import sha256_file
from sparse_export.formats.bundle import BUNDLE_FILE, Bundle, GoldenInfo, read_bundle_info, save_bundle_info
from sparse_export.formats.listed import file_infos
from sparse_export.graph.model import signature_of
from sparse_export.runtimes import probe
from sparse_export.runtimes.choice import open_runtime
from sparse_export.runtimes.probe import require_probed
from sparse_export.signature import class_signature
from tests.engines.making import bundle_info
from tests.graph.dividing import divides
from tests.tagging import SIGNATURE, tagger_bundle

GOLDEN = "golden/input.npy"


def _bundle(folder: Path, divisor: int, golden: np.ndarray | bytes | None = None) -> Bundle:
    """From somebody else. golden: its input, none without."""
    folder.mkdir()
    divides(folder / "model.onnx", divisor)
    if golden is not None:
        (folder / GOLDEN).parent.mkdir()
        if isinstance(golden, bytes):
            (folder / GOLDEN).write_bytes(golden)
        else:
            np.save(folder / GOLDEN, golden)
    info = bundle_info(
        signature=class_signature((4,), 3, names=("x", "y")),
        golden=GoldenInfo(inputs={"x": GOLDEN}, outputs={"y": "golden/output.npy"}, inner={}),
        command=(str(folder),),  # so that no two of these tests have the same manifest
        files=file_infos(folder, ("model.onnx", *([] if golden is None else [GOLDEN]))),
    )
    save_bundle_info(folder, info)
    return Bundle(path=folder, info=read_bundle_info(folder))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What processes were started."""
    words: list[Any] = []
    genuine = subprocess.run

    def run(*args: Any, **options: Any) -> Any:
        words.append(args)
        return genuine(*args, **options)

    monkeypatch.setattr(subprocess, "run", run)
    return words


@pytest.mark.parametrize("golden", [None, np.ones((8, 4), dtype=np.float32)])
def test_a_file_that_runs_is_tried_once_however_often_it_is_opened(
    golden: np.ndarray | None, tmp_path: Path, started: list[Any]
) -> None:
    bundle = _bundle(tmp_path / "b", 2, golden)
    for _ in range(3):
        with open_runtime(bundle, "onnxruntime-cpu") as session:
            assert session.run(np.ones((2, 4), dtype=np.float32)).shape == (2, 3)
    assert len(started) == 1
    assert not trust.is_trusted(sha256_file(bundle.path / BUNDLE_FILE))


def test_another_file_of_the_same_name_is_tried_again(tmp_path: Path, started: list[Any]) -> None:
    bundle = _bundle(tmp_path / "b", 2)
    require_probed(bundle)
    save_bundle_info(bundle.path, replace(bundle.info, created="later"))
    require_probed(bundle)
    assert len(started) == 2


def test_what_this_user_vouches_for_is_not_tried(tmp_path: Path, started: list[Any]) -> None:
    bundle = _bundle(tmp_path / "b", 2)
    digest = sha256_file(bundle.path / BUNDLE_FILE)
    open_runtime(bundle, "onnxruntime-cpu", trust=digest).close()
    require_probed(bundle)
    assert trust.is_trusted(digest)
    assert not started


def test_a_signal_is_an_error_each_time(tmp_path: Path, started: list[Any]) -> None:
    bundle = _bundle(tmp_path / "b", -1, np.ones((8, 4), dtype=np.float32))
    for _ in range(2):
        with pytest.raises(ArtefactError, match=r"b/model\.onnx comes from elsewhere.*ended by SIGFPE"):
            open_runtime(bundle, "onnxruntime-cpu")
    assert len(started) == 2


def test_a_file_that_waits_for_another_batch_than_the_golden_one_is_found_out(tmp_path: Path) -> None:
    """It divides by its batch less 2: which ends no process at 8, and one at 1."""
    bundle = _bundle(tmp_path / "b", -2, np.ones((8, 4), dtype=np.float32))
    model = onnx.load(bundle.onnx_path)
    (once,) = (tensor for tensor in model.graph.initializer if tensor.name == "div_zero")
    once.CopyFrom(numpy_helper.from_array(np.array(np.int64(1)), "div_zero"))
    onnx.save(model, bundle.onnx_path)
    files = file_infos(bundle.path, ("model.onnx", GOLDEN))
    save_bundle_info(bundle.path, replace(bundle.info, files=files))
    with pytest.raises(ArtefactError, match="ended by SIGFPE"):
        require_probed(Bundle(path=bundle.path, info=read_bundle_info(bundle.path)))


def test_a_process_that_says_nothing_has_tried_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_WORKER", "this")  # a module of the standard library that writes no result
    bundle = _bundle(tmp_path / "b", 2)
    for _ in range(2):
        with pytest.raises(ArtefactError, match="ended without a result"):
            require_probed(bundle)


def test_a_file_that_a_trusted_manifest_does_not_list_is_not_opened(
    tmp_path: Path, started: list[Any]
) -> None:
    bundle = _bundle(tmp_path / "b", -1)
    save_bundle_info(bundle.path, replace(bundle.info, files={}))
    bundle = Bundle(path=bundle.path, info=read_bundle_info(bundle.path))
    trust.remember(sha256_file(bundle.path / BUNDLE_FILE))
    with pytest.raises(ArtefactError, match=r"lists no model\.onnx"):
        require_probed(bundle)
    assert started == []


def test_a_store_that_cannot_be_used_vouches_for_nothing_and_stops_nothing(
    tmp_path: Path, started: list[Any]
) -> None:
    bundle = _bundle(tmp_path / "b", 2)
    digest = sha256_file(bundle.path / BUNDLE_FILE)
    trust.remember(digest)
    trust.store_path().chmod(0o644)
    try:
        require_probed(bundle)
        assert len(started) == 1
        require_probed(bundle, trusted=digest)
        assert len(started) == 1
    finally:
        trust.store_path().chmod(0o600)


def test_what_takes_too_long_is_ended_and_may_be_vouched_for(tmp_path: Path) -> None:
    bundle = _bundle(tmp_path / "b", 2)
    digest = sha256_file(bundle.path / BUNDLE_FILE)
    with pytest.raises(ArtefactError, match=rf"was not done after 0\.01 s.*--trust {digest}"):
        require_probed(bundle, limit_s=0.01)


@pytest.mark.parametrize(
    ("divisor", "golden", "told"),
    [
        (0, None, "division by zero"),
        (2, b"no array", r"input\.npy cannot be read"),
        (2, np.ones((8, 5), dtype=np.float32), r"does not take .*input\.npy.*\(8, 5\)"),
        (2, np.ones((8, 4), dtype=np.float64), r"does not take .*input\.npy.*float64"),
    ],
)
def test_an_error_of_the_other_process_is_an_error_of_the_bundle(
    divisor: int, golden: np.ndarray | bytes | None, told: str, tmp_path: Path
) -> None:
    bundle = _bundle(tmp_path / "b", divisor, golden)
    with pytest.raises(ArtefactError, match=f"(?i){told}"):
        require_probed(bundle)


@pytest.mark.parametrize(
    ("kind", "raised"),
    [
        ("MissingCapability", MissingCapability),
        ("OutputError", OutputError),
        ("UsageError", ArtefactError),
        ("no such class", ArtefactError),
    ],
)
def test_what_the_machine_lacks_is_no_fault_of_the_bundle(
    kind: str, raised: type[SparseExportError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(*_: object, **__: object) -> None:
        raise ChildError(kind=kind, what="no.", expected="", do="")

    monkeypatch.setattr("sparse_export.child.call", call)
    with pytest.raises(SparseExportError) as caught:
        require_probed(_bundle(tmp_path / "b", 2))
    assert type(caught.value) is raised


def test_a_process_that_cannot_start_tells_the_end_of_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_WORKER", "sparse_export.runtimes.no_such_module")
    with pytest.raises(ArtefactError, match=r"ended with 1, without a word: .*no_such_module"):
        require_probed(_bundle(tmp_path / "b", 2))


# ---- networks with several inputs


def test_a_network_with_several_inputs_is_run_on_its_golden_ones_and_on_noise(
    tmp_path: Path, started: list[Any]
) -> None:
    bundle = tagger_bundle(tmp_path / "b")
    with open_runtime(bundle, "onnxruntime-cpu") as session:
        assert list(session.run(bundle.info.signature.draw(3, 0))) == ["scores", "tags"]
    assert len(started) == 1


def test_inputs_without_a_golden_file_are_zeros(tmp_path: Path) -> None:
    bundle = tagger_bundle(tmp_path / "b")
    files = {name: file for name, file in bundle.info.files.items() if not name.startswith("golden")}
    save_bundle_info(bundle.path, replace(bundle.info, files=files))
    require_probed(Bundle(path=bundle.path, info=read_bundle_info(bundle.path)))


@pytest.mark.parametrize(("end", "told"), [("inputs", "ids int32"), ("outputs", "tags int32")])
def test_a_file_with_another_signature_than_the_manifest_says_is_refused(
    end: str, told: str, tmp_path: Path
) -> None:
    ends = {"inputs": SIGNATURE.inputs, "outputs": SIGNATURE.outputs}
    ends[end] = tuple(replace(one, dtype="int32") if one.dtype == "int64" else one for one in ends[end])
    wrong = replace(SIGNATURE, inputs=ends["inputs"], outputs=ends["outputs"])
    bundle = tagger_bundle(tmp_path / "b", signature=wrong)
    for trusted in (None, sha256_file(bundle.path / BUNDLE_FILE)):
        with pytest.raises(ArtefactError, match=rf"model\.onnx has the {end} .*{told}.* as its description"):
            open_runtime(bundle, "onnxruntime-cpu", trust=trusted)


def test_a_probe_takes_no_more_memory_than_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that makes 4 GiB of one number. Before, it could take all that the machine has."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Expand", ["x", "sizes"], ["many"]),
        helper.make_node("ReduceMax", ["many"], ["y"], keepdims=0),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)
        for name, sizes in (("x", [1]), ("y", []))
    ]
    sizes = numpy_helper.from_array(np.array([2**30]), "sizes")
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], [sizes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    monkeypatch.setattr(probe, "_memory_bytes", lambda: 2**30)
    with pytest.raises(SparseExportError, match=r"Failed to allocate|bad_alloc|memory"):
        probe.require_runnable(tmp_path / "m.onnx", signature_of(model))
