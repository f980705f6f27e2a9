from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparse_export.errors import ArtefactError, GateFailed, MissingCapability, UnknownNameError, UsageError
from sparse_export.graph import saved
from sparse_export.graph.model import open_model, signature_of
from sparse_export.graph.passes.pack24 import pack
from sparse_export.runtimes import Session
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.runtimes.outputs import outputs_of
from sparse_export.signature import Signature, TensorInfo
from sparse_export.tasks.samples import ArraySamples
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
    ("x", "told"),
    [
        (np.zeros((2, 5), dtype=np.float32), "x has shape (2, 5), not (batch, 4)"),
        (np.zeros(4, dtype=np.float32), "x has shape (4,), not (batch, 4)"),
        (np.zeros((2, 4), dtype=np.float64), "x is float64, not float32"),
    ],
)
def test_an_input_that_does_not_fit_is_refused_with_both_shapes(
    model_path: Path, x: np.ndarray, told: str
) -> None:
    with open_session(model_path) as session, pytest.raises(UsageError) as caught:
        session.run(x)
    assert f"The input {told}." in str(caught.value)
    assert "x float32 (batch, 4) was expected" in str(caught.value)


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


def test_two_outputs_are_given_by_name_and_never_as_one_array(tmp_path: Path) -> None:
    x = np.ones((2, 4), np.float32)
    with open_session(_save(tmp_path / "two.onnx", n_outputs=2)) as session:
        outputs = session.run({"x": x})
        assert list(outputs) == ["y0", "y1"]
        for found in outputs.values():
            np.testing.assert_allclose(found, x @ WEIGHT)
        with pytest.raises(UsageError, match="onnxruntime-cpu gives several outputs: y0, y1"):
            session.run(x)


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
    monkeypatch.setattr(saved, "MAX_WEIGHT_BYTES", 1)  # the dense form goes by way of a file
    assert _output(packed, x) == wanted
    first, second = loaded
    assert first == dense.read_bytes()
    assert isinstance(second, Path) and second != packed and second.name == packed.name


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
        tmp_path / "large.onnx",
        helper.make_node("Expand", ["x", "sizes"], ["y"]),
        constants={"sizes": np.array([2**42, 1, 4])},
    )
    with open_session(path) as session, pytest.raises(MissingCapability, match="memory"):
        session.run(np.zeros((2, 4), dtype=np.float32))


def test_an_answer_with_another_number_of_samples_is_refused(tmp_path: Path) -> None:
    path = _save_of(
        tmp_path / "model.onnx",
        helper.make_node("Compress", ["x", "kept"], ["y"], axis=0),
        shape=["batch", 4],
        constants={"kept": np.array([False, True])},
    )
    with (
        open_session(path) as session,
        pytest.raises(ArtefactError, match=r"answers 2 samples by y of shape \(1, 4\)"),
    ):
        session.run(np.zeros((2, 4), dtype=np.float32))


def test_an_output_may_have_its_samples_along_another_axis_or_none(tmp_path: Path) -> None:
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    turned = _save_of(tmp_path / "turned.onnx", helper.make_node("Transpose", ["x"], ["y"]))
    summed = _save_of(tmp_path / "summed.onnx", helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0))
    with open_session(turned) as session:
        assert session.signature.outputs[0].shape == (4, "batch")
        np.testing.assert_array_equal(session.run(x), x.T)
    with open_session(summed) as session:
        assert session.signature.outputs[0].shape == ()
        np.testing.assert_array_equal(session.run(x), x.sum())


def test_an_output_of_whole_numbers_is_given_as_such(tmp_path: Path) -> None:
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.INT64)
    with open_session(_save_of(tmp_path / "model.onnx", node, kind=TensorProto.INT64)) as session:
        found = session.run(np.full((1, 4), 2.5, np.float32))
    assert found.dtype == np.int64
    assert found.tolist() == [[2, 2, 2, 2]]


def test_texts_among_the_outputs_are_refused_by_name(tmp_path: Path) -> None:
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.STRING)
    with pytest.raises(ArtefactError, match=r"has y, of type tensor\(string\).*Arrays of numbers"):
        open_session(_save_of(tmp_path / "model.onnx", node, kind=TensorProto.STRING))


def test_names_that_are_no_text_are_refused(model_path: Path) -> None:
    """As a few changed bytes make them."""
    content = model_path.read_bytes()
    assert content.count(b"batch") == 2
    model_path.write_bytes(content.replace(b"batch", b"ba\xffch"))
    with pytest.raises(ArtefactError, match=r"model\.onnx"):
        open_session(model_path)


def _save_of(
    path: Path,
    node: onnx.NodeProto,
    *,
    kind: int = TensorProto.FLOAT,
    shape: list[int | str] | None = None,
    constants: dict[str, np.ndarray] | None = None,
) -> Path:
    """A graph of one node from x, float32 (batch, 4), to y."""
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", kind, shape)],
        [numpy_helper.from_array(values, name) for name, values in (constants or {}).items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


# ---- several inputs and outputs


_TOKENS = """
<ir_version: 10, opset_import: ["" : 20]>
tokens (int64[batch, sequence] ids, float[batch, sequence] mask)
    => (float[batch, 3] pooled, int64[batch] longest)
<float[5, 3] table = {0, 1, 2, 10, 11, 12, 20, 21, 22, 30, 31, 32, 40, 41, 42}, int64[1] last = {2}>
{
    words = Gather (table, ids)
    column = Unsqueeze (mask, last)
    kept = Mul (words, column)
    axis = Constant <value_ints = [1]> ()
    pooled = ReduceSum <keepdims: int = 0> (kept, axis)
    longest = ArgMax <axis: int = 1, keepdims: int = 0> (mask)
}
"""


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    onnx.save(onnx.parser.parse_model(_TOKENS), tmp_path / "tokens.onnx")
    return tmp_path / "tokens.onnx"


def _feeds(n: int = 2, length: int = 3) -> dict[str, np.ndarray]:
    ids = np.arange(n * length).reshape(n, length) % 5
    return {"ids": ids, "mask": np.linspace(0, 1, n * length, dtype=np.float32).reshape(n, length)}


@pytest.mark.parametrize(("n", "length"), [(1, 1), (2, 3), (3, 7)])
def test_two_inputs_and_two_outputs_of_any_length_are_run(tokens: Path, n: int, length: int) -> None:
    feeds = _feeds(n, length)
    table = np.arange(5)[:, None] * 10 + np.arange(3)
    with open_session(tokens) as session:
        assert [one.dtype for one in session.signature.inputs] == ["int64", "float32"]
        assert session.signature.batch == "batch"
        found = session.run(feeds)
    wanted = (table[feeds["ids"]] * feeds["mask"][..., None]).sum(1)
    np.testing.assert_allclose(found["pooled"], wanted, rtol=1e-6)
    assert found["longest"].tolist() == [length - 1] * n
    assert found["longest"].dtype == np.int64


def test_inputs_with_wrong_names_types_and_sizes_are_refused_in_words(tokens: Path) -> None:
    feeds = _feeds()
    ids, mask = feeds["ids"], feeds["mask"]
    wrong = [
        (
            {"ids": ids},
            r"The inputs are ids: mask .* is missing\. ids int64 \(batch, sequence\), mask .* was expected",
        ),
        (feeds | {"position": ids}, "The inputs are ids, mask, position"),
        ({"ids": ids.astype(np.int32), "mask": mask}, "ids is int32, not int64"),
        ({"ids": ids[0], "mask": mask}, r"ids has shape \(3,\), not \(batch, sequence\)"),
        ({"ids": ids, "mask": mask[:, :2]}, "sequence is 2 in mask and 3 in another input"),
        ({"ids": ids[:1], "mask": mask}, "batch is 2 in mask and 1 in another input"),
    ]
    with open_session(tokens) as session:
        for given, told in wrong:
            with pytest.raises(UsageError, match=told):
                session.run(given)
        with pytest.raises(UsageError, match=r"One array was given.*ids int64.*mask float32"):
            session.run(ids)


def _described(
    *, dtype: str = "int64", mask: tuple[int | str, ...] = ("n", "length"), batch: str | None = "n"
) -> Signature:
    return Signature(
        inputs=(
            TensorInfo(name="ids", dtype=dtype, shape=("n", "length"), low=0, high=4),
            TensorInfo(name="mask", dtype="float32", shape=mask),
        ),
        outputs=(
            TensorInfo(name="pooled", dtype="float32", shape=("n", 3)),
            TensorInfo(name="longest", dtype="int64", shape=("n",)),
        ),
        batch=batch,
    )


def test_free_sizes_are_called_as_the_signature_has_them(tokens: Path) -> None:
    with open_session(tokens, signature=_described()) as session:
        assert session.signature == _described()
        with pytest.raises(UsageError, match="length is 2 in mask and 3 in another input"):
            session.run(_feeds() | {"mask": np.ones((2, 2), np.float32)})


@pytest.mark.parametrize(
    "described",
    [
        _described(dtype="int32"),
        _described(mask=("n",)),
        replace(_described(), inputs=_described().inputs[::-1]),
        replace(_described(), outputs=_described().outputs[:1]),
        replace(
            _described(),
            outputs=(TensorInfo(name="pooled", dtype="float32", shape=("n", 4)), _described().outputs[1]),
        ),
    ],
)
def test_a_file_with_another_signature_than_it_is_described_with_is_refused(
    tokens: Path, described: Signature
) -> None:
    with pytest.raises(
        ArtefactError, match=r"tokens\.onnx has the (inputs|outputs) .*as its description says"
    ):
        open_session(tokens, signature=described)


def test_the_samples_may_lie_along_another_axis_than_the_first(tmp_path: Path) -> None:
    graph = """
    <ir_version: 10, opset_import: ["" : 20]>
    recurrent (float[2, batch, 3] state) => (float[batch, 2, 3] y) {
        y = Transpose <perm = [1, 0, 2]> (state)
    }
    """
    onnx.save(onnx.parser.parse_model(graph), tmp_path / "state.onnx")
    state = np.arange(30, dtype=np.float32).reshape(2, 5, 3)
    described = Signature(
        inputs=(TensorInfo(name="state", dtype="float32", shape=(2, "batch", 3)),),
        outputs=(TensorInfo(name="y", dtype="float32", shape=("batch", 2, 3)),),
    )
    with open_session(tmp_path / "state.onnx", signature=described) as session:
        samples = ArraySamples(feeds={"state": state}, signature=described)
        assert len(samples) == 5
        one_by_one = [session.run(feeds)["y"] for feeds in samples.batches(2)]
        assert [len(y) for y in one_by_one] == [2, 2, 1]
        np.testing.assert_array_equal(np.concatenate(one_by_one), outputs_of(session, samples)["y"])
        np.testing.assert_array_equal(session.run(state), state.transpose(1, 0, 2))


def test_without_a_batch_axis_a_call_is_one_sample(tmp_path: Path) -> None:
    graph = """
    <ir_version: 10, opset_import: ["" : 20]>
    fixed (float[2, 3] x, int64 rate) => (float[2, 3] y) {
        factor = Cast <to: int = 1> (rate)
        y = Mul (x, factor)
    }
    """
    onnx.save(onnx.parser.parse_model(graph), tmp_path / "fixed.onnx")
    with open_session(tmp_path / "fixed.onnx") as session:
        assert session.signature.batch is None
        feeds = {"x": np.ones((2, 3), np.float32), "rate": np.array(3)}
        samples = ArraySamples(feeds=feeds, signature=session.signature)
        assert len(samples) == 1
        np.testing.assert_array_equal(outputs_of(session, samples)["y"], np.full((2, 3), 3.0))


def test_values_inside_the_graph_are_given_behind_the_outputs(tokens: Path) -> None:
    with open_session(tokens, signature=_described(), inner=("kept",)) as session:
        assert session.signature.outputs[-1].shape == ("n", "length", 3)
        found = session.run(_feeds())
    assert list(found) == ["pooled", "longest", "kept"]
    np.testing.assert_allclose(found["kept"].sum(1), found["pooled"], rtol=1e-6)


def test_nan_in_one_of_several_outputs_is_told_with_its_name_and_sample(tokens: Path) -> None:
    feeds = _feeds()
    feeds["mask"][1, 2] = np.nan
    with open_session(tokens) as session:
        samples = ArraySamples(feeds=feeds, signature=session.signature)
        with pytest.raises(
            GateFailed, match=r"The model gives NaN .* in pooled for 1 of 2 samples, first number 1"
        ):
            outputs_of(session, samples, who="The model")


def test_integers_that_the_network_does_not_take_are_named_with_value_and_range(tmp_path: Path) -> None:
    """Before, in onnxruntime's words, as a fault of the file."""
    table = onnx.numpy_helper.from_array(np.ones((100, 4), np.float32), "table")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Gather", ["table", "ids"], ["y"])],
        "words",
        [onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n", 8])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 8, 4])],
        [table],
    )
    file = tmp_path / "m.onnx"
    opset = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), file)
    signature = signature_of(open_model(file))
    with open_session(file, signature=signature) as session:
        session.run({"ids": np.full((2, 8), 99)})
        with pytest.raises(UsageError, match="ids holds 100, and the network takes 0 to 99"):
            session.run({"ids": np.full((2, 8), 100)})
