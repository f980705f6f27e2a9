from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparse_export.errors import ArtefactError, MissingCapability, UnknownNameError, UsageError
from sparse_export.graph.passes.pack24 import pack
from sparse_export.runtimes import Session
from sparse_export.runtimes.onnxruntime import open_session
from tests.graph.dividing import divides
from tests.graph.packed import gemm, initializer, two_four

WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3)


def _save(path: Path, *, batch: int | str = "batch", n_outputs: int = 1) -> Path:
    nodes = [helper.make_node("Gemm", ["x", "w"], [f"y{i}"]) for i in range(n_outputs)]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4])],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [batch, 3]) for i in range(n_outputs)],
        [numpy_helper.from_array(WEIGHT, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    return _save(tmp_path / "model.onnx")


@pytest.mark.parametrize("n_threads", [None, 1, 2])
def test_a_session_computes_what_the_file_says(model_path: Path, n_threads: int | None) -> None:
    x = np.random.default_rng(0).standard_normal((5, 4), dtype=np.float32)
    with open_session(model_path, n_threads=n_threads) as session:
        assert session.name == "onnxruntime-cpu"
        np.testing.assert_allclose(session.run(x), x @ WEIGHT, rtol=1e-5, atol=1e-5)


def test_nothing_is_printed(model_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with open_session(model_path) as session:
        session.run(np.zeros((1, 4), dtype=np.float32))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "x",
    [
        np.zeros((2, 5), dtype=np.float32),
        np.zeros(4, dtype=np.float32),
        np.zeros((2, 4), dtype=np.float64),
    ],
)
def test_an_input_that_does_not_fit_is_refused_with_both_shapes(model_path: Path, x: np.ndarray) -> None:
    with open_session(model_path) as session, pytest.raises(UsageError) as caught:
        session.run(x)
    assert f"{x.dtype} of shape {x.shape}" in str(caught.value)
    assert "float32 of shape (any, 4)" in str(caught.value)


def test_a_fixed_batch_takes_that_batch_only(tmp_path: Path) -> None:
    with open_session(_save(tmp_path / "fixed.onnx", batch=2)) as session:
        assert session.run(np.ones((2, 4), dtype=np.float32)).shape == (2, 3)
        with pytest.raises(UsageError, match=r"\(2, 4\) was expected"):
            session.run(np.ones((3, 4), dtype=np.float32))


def test_a_closed_session_does_not_run(model_path: Path) -> None:
    session: Session = open_session(model_path)
    session.close()
    session.close()
    with pytest.raises(UsageError, match="closed"):
        session.run(np.zeros((1, 4), dtype=np.float32))


@pytest.mark.parametrize("content", [b"", b"not an onnx file" * 9])
def test_a_file_that_is_not_onnx_is_an_artefact_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"broken\.onnx"):
        open_session(path)


def test_a_truncated_file_is_an_artefact_error(model_path: Path) -> None:
    model_path.write_bytes(model_path.read_bytes()[:-20])
    with pytest.raises(ArtefactError, match="cannot load"):
        open_session(model_path)


def test_a_file_with_two_outputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="2 outputs"):
        open_session(_save(tmp_path / "two.onnx", n_outputs=2))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.onnx is not a file"):
        open_session(tmp_path / "absent.onnx")


def test_an_unknown_provider_gets_the_nearest_known_one(model_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'cuda'"):
        open_session(model_path, provider="cudda")


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine may run on cuda")
def test_a_provider_that_does_not_work_here_is_never_replaced_by_another(model_path: Path) -> None:
    with pytest.raises(MissingCapability, match="cannot run on 'cuda' here"):
        open_session(model_path, provider="cuda")


@pytest.mark.parametrize("n_threads", [0, -1])
def test_fewer_than_one_thread_is_refused(model_path: Path, n_threads: int) -> None:
    with pytest.raises(UsageError, match=f"{n_threads} threads"):
        open_session(model_path, n_threads=n_threads)


@pytest.fixture
def packed_paths(tmp_path: Path) -> tuple[Path, Path]:
    """A dense file and the packed one of the same network."""
    model = gemm(two_four((6, 8), 1))
    onnx.save(model, tmp_path / "dense.onnx")
    onnx.save(pack(model), tmp_path / "packed.onnx")
    return tmp_path / "dense.onnx", tmp_path / "packed.onnx"


def _output(path: Path, x: np.ndarray) -> bytes:
    with open_session(path, n_threads=1) as session:
        return session.run(x).tobytes()


def test_a_packed_file_gives_the_bits_of_the_dense_one(
    packed_paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, packed = packed_paths
    x = np.random.default_rng(0).standard_normal((5, 8), dtype=np.float32)
    wanted = _output(dense, x)
    loaded = []
    genuine = onnxruntime.InferenceSession

    def noting(content: object, *args: object, **options: object) -> object:
        loaded.append(content)
        return genuine(content, *args, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", noting)
    assert _output(packed, x) == wanted
    monkeypatch.setattr(onnx.checker, "MAXIMUM_PROTOBUF", 1)
    assert _output(packed, x) == wanted
    assert loaded == [dense.read_bytes(), packed]


def test_damaged_packed_weights_are_an_artefact_error_with_the_file(packed_paths: tuple[Path, Path]) -> None:
    model = onnx.load(packed_paths[1])
    initializer(model, "w.meta").raw_data = b"\x44" * 6
    onnx.save(model, packed_paths[1])
    with pytest.raises(ArtefactError, match=r"packed\.onnx.*packed model is damaged"):
        open_session(packed_paths[1])


def test_the_words_of_the_format_alone_do_not_make_a_file_packed(model_path: Path) -> None:
    model = onnx.load(model_path)
    model.doc_string = "not sparse24"
    onnx.save(model, model_path)
    with open_session(model_path) as session:
        assert session.run(np.zeros((1, 4), dtype=np.float32)).shape == (1, 3)


def test_what_onnxruntime_raises_at_a_run_is_told_with_the_file(tmp_path: Path) -> None:
    path = divides(tmp_path / "model.onnx", 0)
    with (
        open_session(path) as session,
        pytest.raises(ArtefactError, match=r"cannot run .*model\.onnx.*division"),
    ):
        session.run(np.zeros((2, 4), dtype=np.float32))


def test_too_little_memory_is_no_fault_of_the_file(tmp_path: Path) -> None:
    path = _save_of(
        tmp_path / "large.onnx", helper.make_node("Expand", ["x", "sizes"], ["y"]), sizes=[2**42, 1, 4]
    )
    with open_session(path) as session, pytest.raises(MissingCapability, match="memory"):
        session.run(np.zeros((2, 4), dtype=np.float32))


@pytest.mark.parametrize("node", ["ReduceSum", "Transpose"])
def test_an_answer_without_a_row_for_each_sample_is_refused(tmp_path: Path, node: str) -> None:
    path = _save_of(tmp_path / "model.onnx", helper.make_node(node, ["x"], ["y"]))
    with (
        open_session(path) as session,
        pytest.raises(ArtefactError, match="answers 2 samples by an output of shape"),
    ):
        session.run(np.zeros((2, 4), dtype=np.float32))


def test_an_output_of_whole_numbers_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.INT64)
    with pytest.raises(ArtefactError, match="floating point too"):
        open_session(_save_of(tmp_path / "model.onnx", node, kind=TensorProto.INT64))


def test_names_that_are_no_text_are_refused(model_path: Path) -> None:
    """As a few changed bytes make them."""
    content = model_path.read_bytes()
    assert content.count(b"batch") == 2
    model_path.write_bytes(content.replace(b"batch", b"ba\xffch"))
    with pytest.raises(ArtefactError, match=r"model\.onnx"):
        open_session(model_path)


def _save_of(
    path: Path, node: onnx.NodeProto, *, kind: int = TensorProto.FLOAT, sizes: list[int] | None = None
) -> Path:
    """A graph of one node from x, float32 (batch, 4), to y of unknown shape."""
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", kind, None)],
        [] if sizes is None else [numpy_helper.from_array(np.array(sizes, dtype=np.int64), "sizes")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path
