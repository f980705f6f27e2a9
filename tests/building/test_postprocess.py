"""What `build --postprocess` appends computes what it says, and changes no score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from scipy.special import expit, softmax

from sparse_export.building import build
from sparse_export.building.from_source import run_at
from sparse_export.building.golden import Golden
from sparse_export.building.postprocess import golden_with_postprocess
from sparse_export.engines.options import Precision
from sparse_export.errors import GateFailed, UsageError
from sparse_export.evaluate.compare import compare
from sparse_export.evaluate.validate import validate
from sparse_export.formats.bundle import Bundle, open_bundle
from sparse_export.formats.run import Run
from sparse_export.graph.passes.postprocess import require_steps, with_postprocess
from sparse_export.signature import Signature, TensorInfo, class_signature
from tests.exporting import exported_once
from tests.making_runs import digits_run

ALL = ("softmax", "argmax", "topk:3")
_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "float64": TensorProto.DOUBLE}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Bundle, Bundle]:
    """A run, its bundle, and one with everything appended."""
    folder = tmp_path_factory.mktemp("made")
    run = digits_run(folder / "run")
    with exported_once():
        return run, build(run.path, folder / "plain"), build(run.path, folder / "more", postprocess=ALL)


def identity(*shape: int | str, dtype: str = "float32", opset: int = 20) -> tuple[onnx.ModelProto, Signature]:
    """A graph that gives its scores as they come."""
    ends = [helper.make_tensor_value_info(name, _TYPES[dtype], ["batch", *shape]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [ends[0]], [ends[1]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    infos = [TensorInfo(name=name, dtype=dtype, shape=("batch", *shape)) for name in "xy"]
    return model, Signature(inputs=(infos[0],), outputs=(infos[1],))


def run(model: onnx.ModelProto, x: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return dict(zip([one.name for one in session.get_outputs()], session.run(None, {"x": x}), strict=True))


def test_the_scores_stay_and_the_appended_outputs_are_right_on_new_inputs(made: Any) -> None:
    _, plain, more = made
    x = np.random.default_rng(1).standard_normal((37, 1, 8, 8), dtype=np.float32)
    session = onnxruntime.InferenceSession(more.onnx_path)
    names = [one.name for one in session.get_outputs()]
    logits, probabilities, best, top_scores, top = session.run(None, {"input": x})
    assert names == ["logits", "probabilities", "class", "top_scores", "top_classes"]
    assert names == list(more.info.signature.whole.output_names)
    (wanted,) = onnxruntime.InferenceSession(plain.onnx_path).run(None, {"input": x})
    assert logits.tobytes() == wanted.tobytes()
    np.testing.assert_allclose(probabilities, softmax(logits.astype(float), 1), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(best, logits.argmax(1))
    np.testing.assert_array_equal(top, np.argsort(-logits, 1)[:, :3])
    np.testing.assert_array_equal(top_scores, np.take_along_axis(probabilities, top, 1))


def test_the_score_is_that_of_the_network_and_the_golden_pair_has_what_was_added(made: Any) -> None:
    _, plain, more = made
    assert more.info.signature.agrees_with(plain.info.signature)
    assert (more.info.postprocess, plain.info.postprocess) == (ALL, ())
    assert {"probabilities", "top_scores"} <= set(more.info.golden.inner)
    assert open_bundle(more.path).info == more.info
    first, second = validate(plain), validate(more)
    assert second.parity_ok
    assert second.score == first.score is not None
    assert [one.name for one in second.golden.outputs] == ["logits", *more.info.golden.inner]
    same = compare(plain, more, rounds=20, block_s=0.001, batches=(1,), n_threads=1)
    assert same.dense.score == same.sparse.score == first.score


def test_a_bundle_of_a_graph_is_held_against_the_graph_of_its_run(made: Any, tmp_path: Path) -> None:
    run = run_at(made[1].onnx_path, run_folder=tmp_path / "run")
    bundle = build(run, tmp_path / "bundle", postprocess=["softmax", "topk:2"])
    validation = validate(bundle)
    assert validation.parity is not None
    assert validation.parity_ok
    assert {"logits", "probabilities"} <= {one.name for one in validation.golden.outputs}


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_precisions_keep_what_is_appended_in_float32(
    precision: Precision, made: Any, tmp_path: Path
) -> None:
    bundle = build(made[0].path, tmp_path / "bundle", postprocess=ALL, precision=precision, compact=True)
    assert [one.dtype for one in bundle.info.signature.appended] == ["float32", "int64", "float32", "int64"]
    assert validate(bundle).parity_ok


def test_a_bundle_made_to_satisfy_a_pattern_is_scored_before_and_after(made: Any, tmp_path: Path) -> None:
    run = made[0].path
    plain, more = (
        build(run, tmp_path / name, pattern="2:4", max_cut=0.9, postprocess=steps).info.fitted
        for name, steps in (("plain", ()), ("more", ALL))
    )
    assert more is not None
    assert more.not_measured is None
    assert more == plain


def test_a_golden_value_that_the_graph_does_not_give_fails_validation(made: Any, tmp_path: Path) -> None:
    model = onnx.load(made[2].onnx_path)
    (node,) = (one for one in model.graph.node if one.op_type == "Softmax")
    node.attribute[0].i = 0
    onnx.save(model, tmp_path / "model.onnx")
    golden = Golden(inputs={"input": np.zeros((2, 1, 8, 8), np.float32)}, outputs={}, smaller={})
    info = made[2].info
    with pytest.raises(GateFailed, match="another probabilities than NumPy computes"):
        golden_with_postprocess(tmp_path / "model.onnx", info.signature, golden, ALL, 3e-4)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize(("shape", "axis"), [((5,), 1), (("n", 5), 2), ((5, 3, 4), 1)])
def test_classes_lie_along_the_axis_of_logits_tokens_or_pixels(
    shape: tuple[int | str, ...], axis: int, dtype: str
) -> None:
    model, signature = identity(*shape, dtype=dtype)
    appended, whole = with_postprocess(model, signature, ["topk:2", "argmax", "softmax"])
    onnx.checker.check_model(appended, full_check=True)
    sizes = [6 if isinstance(one, str) else one for one in ("batch", *shape)]
    x = np.random.default_rng(2).permutation(np.prod(sizes)).reshape(sizes).astype(dtype) / 16
    found = run(appended, x)
    assert tuple(found) == whole.whole.output_names
    wanted = softmax(x.astype(np.float32).astype(float), axis)
    np.testing.assert_allclose(found["probabilities"], wanted, rtol=2e-5, atol=1e-7)
    np.testing.assert_array_equal(found["class"], x.argmax(axis))
    top = np.argsort(-x, axis).take([0, 1], axis)
    np.testing.assert_array_equal(found["top_classes"], top)
    for one in whole.appended:
        assert one.problem(found[one.name], {}) is None


def test_a_sigmoid_takes_scores_that_stand_alone_and_saturated_ones_keep_their_order() -> None:
    appended, _ = with_postprocess(*identity(), ["sigmoid"])
    x = np.array([-90.0, -1.0, 0.0, 30.0], np.float32)
    np.testing.assert_allclose(run(appended, x)["probabilities"], expit(x), rtol=1e-5, atol=1e-30)
    appended, _ = with_postprocess(*identity(4), ["sigmoid", "topk:3"])
    found = run(appended, np.array([[40.0, 60.0, -1.0, 50.0]], np.float32))  # 1.0 in float32, three times
    assert found["top_classes"].tolist() == [[1, 3, 0]]
    assert found["top_scores"].tolist() == [[1.0, 1.0, 1.0]]


def test_classes_that_rounding_could_change_are_checked_and_not_stored(tmp_path: Path) -> None:
    model, signature = identity(3)
    steps = ["argmax", "topk:2"]
    appended, signature = with_postprocess(model, signature, steps)
    onnx.save(appended, tmp_path / "m.onnx")
    near = np.array([[1.0, 1.00001, -3.0], [5.0, 2.0, 1.0]], np.float32)
    clear = near + np.array([[0, 0.5, 0], [0, 0, 0]], np.float32)
    for x, kept in ((near, ("top_scores",)), (clear, ("class", "top_scores", "top_classes"))):
        golden = Golden(inputs={"x": x}, outputs={"y": x}, smaller={})
        assert golden_with_postprocess(tmp_path / "m.onnx", signature, golden, steps, 3e-4).inner == kept


def test_names_that_the_graph_has_already_stay_its_own() -> None:
    model, signature = identity(3)
    model.graph.node[0].input[0] = model.graph.input[0].name = "probabilities"
    appended, signature = with_postprocess(model, signature, ["softmax"])
    assert [one.name for one in signature.appended] == ["probabilities_"]
    assert [one.name for one in appended.graph.output] == ["y", "probabilities_"]


@pytest.mark.parametrize(
    ("steps", "shape", "what"),
    [
        (["softmaks"], (3,), "is not known"),
        (["topk"], (3,), "is not known"),
        (["topk:x"], (3,), "is not known"),
        (["softmax", "sigmoid"], (3,), "softmax, sigmoid"),
        (["topk:1", "topk:2"], (3,), "topk:1, topk:2"),
        (["topk:4"], (3,), "for 3 classes"),
        (["topk:0"], (3,), "for 3 classes"),
        (["softmax"], (1,), "no axis of two classes"),
        (["argmax"], (), "no axis of two classes"),
        (["softmax"], ("n",), "no axis of two classes"),
        (["softmax"], (1,), "Use sigmoid for a score that stands alone"),
        (["topk:5"], (22, "anchors"), r"\(batch, 22, anchors\), .* \(batch, classes\).* Leave it out"),
    ],
)
def test_what_does_not_fit_the_network_is_refused(
    steps: Sequence[str], shape: tuple[int | str, ...], what: str
) -> None:
    with pytest.raises(UsageError, match=what):
        require_steps(steps, identity(*shape)[1])


def test_a_request_that_does_not_fit_is_refused_before_the_build(made: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="for 10 classes"):
        build(made[0].path, tmp_path / "out", postprocess=["topk:11"])
    assert not (tmp_path / "out").exists()


def test_a_graph_of_an_old_opset_is_refused() -> None:
    with pytest.raises(UsageError, match="opset 12"):
        with_postprocess(*identity(3, opset=12), ["softmax"])


def test_scores_of_classes_are_the_first_output_and_its_probabilities(made: Any) -> None:
    assert made[1].info.class_scores == ("logits",)
    assert made[2].info.class_scores == ("logits", "probabilities")
    appended = class_signature((1, 8, 8), 10, names=("input", "top_scores")).outputs
    signature = replace(made[1].info.signature, appended=appended)
    assert replace(made[1].info, postprocess=("topk:10",), signature=signature).class_scores == ("logits",)
