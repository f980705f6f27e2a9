"""Validation measures the file that ships, and its gates fail when they should."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from sparse_export.building import build
from sparse_export.errors import ArtefactError, GateFailed, NotTrustedError, UsageError
from sparse_export.evaluate.parity import parity_by_batch, parity_of
from sparse_export.evaluate.validate import validate
from sparse_export.evaluate.validation import Validation, check_gates, parity_text, write_results
from sparse_export.files import sha256_file
from sparse_export.formats.bundle import Bundle, RunReference, read_bundle_info, save_bundle_info
from sparse_export.formats.listed import file_infos
from sparse_export.formats.score import Score
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.signature import class_signature
from sparse_export.tasks import data
from tests.making_runs import digits_accuracy, digits_fact, digits_run, network_and_masks, save_run
from tests.tagging import TABLE, tagger_bundle

VALIDATING: Any = sys.modules["sparse_export.evaluate.validate"]


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build(digits_run(tmp_path_factory.mktemp("sparse") / "run"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build(digits_run(tmp_path_factory.mktemp("dense") / "run", density=1.0, seed=6))


@pytest.fixture(scope="module")
def found(sparse: Bundle, dense: Bundle) -> Validation:
    return validate(sparse, against=dense.path)


@pytest.fixture
def copied(sparse: Bundle, tmp_path: Path) -> Path:
    """A bundle of its own, to be spoilt."""
    shutil.copytree(sparse.path, tmp_path / "bundle")
    return tmp_path / "bundle"


def rewrite(folder: Path, **changes: Any) -> None:
    """Make the manifest agree with files that were changed on purpose."""
    info = read_bundle_info(folder)
    save_bundle_info(folder, replace(info, files=file_infos(folder, info.files), **changes))


def change_bias(folder: Path, value: float) -> None:
    """Add to the first logit of the network in a bundle."""
    model = onnx.load(folder / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.name == "fc2.bias":
            values = numpy_helper.to_array(tensor).copy()
            values[0] += value
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, folder / "model.onnx")
    rewrite(folder)


def correct_by_hand(bundle: Bundle) -> np.ndarray[Any, Any]:
    digits = data.load("digits")
    x = (digits.x_test.numpy() / 255.0 - np.array(digits.mean)[:, None, None]) / np.array(digits.std)[
        :, None, None
    ]
    session = onnxruntime.InferenceSession(bundle.onnx_path, providers=["CPUExecutionProvider"])
    logits = session.run(None, {"input": x.astype(np.float32)})[0]
    right: np.ndarray[Any, Any] = logits.argmax(axis=1) == digits.y_test.numpy()
    return right


def test_the_accuracy_is_that_of_the_file_on_the_whole_test_set(found: Validation, sparse: Bundle) -> None:
    right = correct_by_hand(sparse)
    assert found.score == Score(n_correct=int(right.sum()), n_samples=right.size)


def test_the_file_and_pytorch_agree(found: Validation) -> None:
    assert found.parity is not None
    assert found.parity_ok
    assert found.parity.n_samples == len(data.load("digits").x_test)
    assert found.parity.top1_agreement == 1.0
    assert 0 < found.parity.max_abs_difference < 1e-3
    assert found.parity.max_relative_difference < 1e-4
    assert found.torch_score == found.score


def test_the_drop_is_from_the_runs_own_record(found: Validation) -> None:
    assert found.recorded is not None
    assert found.recorded == found.torch_score
    assert found.drop == 0.0


def test_the_difference_from_dense_is_paired(found: Validation, sparse: Bundle, dense: Bundle) -> None:
    assert found.against is not None
    expected = 100 * (correct_by_hand(sparse).mean() - correct_by_hand(dense).mean())
    assert found.against.difference.amount == pytest.approx(expected)
    assert found.against.difference.low < found.against.difference.amount < found.against.difference.high


def test_the_table_names_every_figure(found: Validation) -> None:
    text = str(found)
    assert found.score is not None
    assert text.count(f"({found.score.n_correct}/{found.score.n_samples})") >= 3
    assert "95 % interval" in text
    assert text.endswith("passed")


def test_the_result_survives_json(found: Validation, tmp_path: Path) -> None:
    path = write_results(tmp_path / "results", found)
    assert path == tmp_path / "results" / "validation.json"
    assert json.loads(path.read_bytes()) == json.loads(json.dumps(asdict(found)))


def test_a_tampered_file_is_not_run(copied: Path) -> None:
    content = bytearray((copied / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (copied / "model.onnx").write_bytes(content)
    with pytest.raises(ArtefactError, match=r"model\.onnx is not the file that was written"):
        validate(copied)


def test_a_bundle_in_memory_is_checked_again(sparse: Bundle, copied: Path) -> None:
    bundle = replace(sparse, path=copied)
    (copied / "model.onnx").write_bytes(b"")
    with pytest.raises(ArtefactError, match=r"model\.onnx has 0 bytes"):
        validate(bundle)


def test_a_file_that_is_not_on_record_is_not_run(copied: Path) -> None:
    info = read_bundle_info(copied)
    files = {name: fact for name, fact in info.files.items() if name != "model.onnx"}
    save_bundle_info(copied, replace(info, files=files))
    with pytest.raises(ArtefactError, match=r"lists no model\.onnx"):
        validate(copied)


def test_a_network_that_computes_something_else_is_told_and_fails_the_gate(copied: Path) -> None:
    change_bias(copied, 0.25)
    result = validate(copied)
    assert result.parity is not None
    assert not result.parity_ok
    assert result.parity.max_abs_difference == pytest.approx(0.25, abs=0.01)
    assert "OUTSIDE" in str(result)
    with pytest.raises(
        GateFailed, match=r"differ from the golden pair by 0\.25.*differ from the network by 0\.25"
    ):
        check_gates(result)


def change_one_batch_size(folder: Path, size: int) -> None:
    """Add 0.25 to all logits that the network in a bundle gives for a batch of that size."""
    model = onnx.load(folder / "model.onnx")
    (last,) = (node for node in model.graph.node if "logits" in node.output)
    last.output[:] = ["right"]
    model.graph.initializer.append(numpy_helper.from_array(np.array([size], np.int64), "size"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([0.25], np.float32), "quarter"))
    model.graph.node.extend(
        [
            onnx.helper.make_node("Shape", ["input"], ["n"], start=0, end=1),
            onnx.helper.make_node("Equal", ["n", "size"], ["same"]),
            onnx.helper.make_node("Cast", ["same"], ["one"], to=onnx.TensorProto.FLOAT),
            onnx.helper.make_node("Mul", ["one", "quarter"], ["more"]),
            onnx.helper.make_node("Add", ["right", "more"], ["logits"]),
        ]
    )
    onnx.save(model, folder / "model.onnx")
    rewrite(folder)


def test_a_graph_that_is_wrong_at_one_batch_size_fails_the_gate_and_names_it(copied: Path) -> None:
    change_one_batch_size(copied, 1)
    result = validate(copied)
    assert result.golden.ok
    assert result.parity is not None
    assert result.parity.ok
    assert not result.parity_ok
    assert [(one.batch, one.ok) for one in result.batches] == [(1, False), (2, True), (3, True), (8, True)]
    assert result.batches[0].max_abs_difference == pytest.approx(0.25, abs=0.01)
    assert "2, 3 and 8: within tolerance; 1: OUTSIDE tolerance" in str(result)
    with pytest.raises(GateFailed, match="differ from the network at batch 1 and agree at batch 2, 3 and 8"):
        check_gates(result)


def test_a_golden_output_that_is_not_reproduced_fails_the_gate(copied: Path) -> None:
    golden = np.load(copied / "golden" / "output.npy")
    np.save(copied / "golden" / "output.npy", golden + 1)
    rewrite(copied)
    result = validate(copied)
    assert result.parity is not None
    assert result.parity.ok
    with pytest.raises(GateFailed, match="differ from the golden pair by 1"):
        check_gates(result)


def test_nan_in_the_logits_fails_the_gate_at_once(copied: Path) -> None:
    change_bias(copied, float("nan"))
    with pytest.raises(GateFailed, match=r"gives NaN or infinity in logits for 8 of 8 samples"):
        validate(copied)


def test_other_test_data_than_the_runs_are_refused(copied: Path) -> None:
    info = read_bundle_info(copied)
    assert info.data is not None
    rewrite(copied, data=replace(info.data, test_sha256="0" * 64))
    with pytest.raises(ArtefactError, match="test data of digits differ"):
        validate(copied)


def test_a_run_that_is_gone_is_told_and_parity_rests_on_the_golden_pair(copied: Path) -> None:
    rewrite(copied, run=RunReference(path="/nowhere/run", run_sha256="0" * 64))
    result = validate(copied)
    assert result.parity is None
    assert result.torch_score is None
    assert result.parity_ok
    assert result.run_missing == "The run /nowhere/run is no longer there."
    assert "The run /nowhere/run is no longer there." in str(result)
    check_gates(result)


def test_a_run_whose_place_the_system_refuses_to_look_at_counts_as_gone(copied: Path) -> None:
    path = f"/{'x' * 300}/run"
    rewrite(copied, run=RunReference(path=path, run_sha256="0" * 64))
    assert validate(copied).run_missing == f"The run {path} is no longer there."


def test_a_run_that_moved_can_be_given(sparse: Bundle, copied: Path, tmp_path: Path) -> None:
    run = Path(sparse.info.run.path)
    shutil.copytree(run, tmp_path / "moved")
    rewrite(copied, run=replace(sparse.info.run, path="/nowhere/run"))
    result = validate(copied, run=tmp_path / "moved")
    assert result.parity is not None
    assert result.run_missing is None


def test_another_run_than_the_bundles_is_refused(sparse: Bundle, dense: Bundle) -> None:
    with pytest.raises(ArtefactError, match=r"is not the run that .* was built from"):
        validate(sparse, run=dense.info.run.path)


def test_a_run_that_is_given_must_be_there(sparse: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        validate(sparse, run=tmp_path / "absent")


def test_a_factory_that_nobody_vouched_for_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    module, masks = network_and_masks()
    run = save_run(tmp_path / "run", module, masks, name="no_such_module:net")
    bundle = build(replace(run, module=module))
    with pytest.raises(NotTrustedError, match=bundle.info.run.run_sha256):
        validate(bundle)


def spoil_record(folder: Path, n_more: int) -> None:
    info = read_bundle_info(folder)
    assert info.score is not None
    assert info.score.n_correct is not None
    rewrite(folder, score=replace(info.score, n_correct=info.score.n_correct + n_more))


def test_a_drop_within_the_bound_passes(copied: Path) -> None:
    spoil_record(copied, 10)
    result = validate(copied, max_drop=100 * 10 / len(data.load("digits").x_test))
    assert result.drop == pytest.approx(result.max_drop)
    check_gates(result)


def test_a_drop_beyond_the_bound_fails_the_gate_with_the_figures(copied: Path) -> None:
    spoil_record(copied, 11)
    bound = 100 * 10 / len(data.load("digits").x_test)
    result = validate(copied, max_drop=bound)
    assert result.drop is not None
    with pytest.raises(GateFailed, match=f"accuracy is {result.drop:.2f} points below the recorded one"):
        check_gates(result)
    assert "below the recorded one" in str(result)


def test_a_drop_without_a_bound_is_no_gate(copied: Path) -> None:
    spoil_record(copied, 50)
    check_gates(validate(copied))


def test_the_bound_holds_against_the_dense_bundle_too(sparse: Bundle, dense: Bundle) -> None:
    better, worse = sorted((sparse, dense), key=lambda bundle: -correct_by_hand(bundle).mean())
    assert correct_by_hand(better).mean() > correct_by_hand(worse).mean()
    check_gates(validate(better, against=worse.path, max_drop=0.0))
    with pytest.raises(GateFailed, match="points below the dense bundle's"):
        check_gates(validate(worse, against=better.path, max_drop=0.0))


def test_a_dense_bundle_of_other_data_is_refused(sparse: Bundle, copied: Path) -> None:
    info = read_bundle_info(copied)
    assert info.data is not None
    rewrite(copied, data=replace(info.data, test_sha256="0" * 64))
    with pytest.raises(UsageError, match="the very same samples"):
        validate(sparse, against=copied)


@pytest.mark.parametrize("bound", [-0.1, float("nan"), float("inf")])
def test_a_bound_that_is_no_bound_is_refused(sparse: Bundle, bound: float) -> None:
    with pytest.raises(UsageError, match="allowed drop"):
        validate(sparse, max_drop=bound)


def test_a_bundle_without_data_is_held_to_its_network_and_golden_pair(tmp_path: Path) -> None:
    module, masks = network_and_masks()
    bundle = build(save_run(tmp_path / "run", module, masks))
    result = validate(bundle)
    assert result.score is None
    assert result.parity is not None
    assert result.parity.n_samples == 8
    check_gates(result)
    with pytest.raises(UsageError, match="names no data set"):
        validate(bundle, max_drop=1.0)


def test_a_bound_without_any_record_is_refused(tmp_path: Path) -> None:
    module, masks = network_and_masks()
    bundle = build(save_run(tmp_path / "run", module, masks, fact=digits_fact()))
    with pytest.raises(UsageError, match="no recorded score"):
        validate(bundle, max_drop=1.0)


def test_real_mnist_goes_through_build_and_validation(mnist_dir: Path, tmp_path: Path) -> None:
    mnist = data.load("mnist", mnist_dir)
    module, masks = network_and_masks("lenet300-100", density=0.1)
    fact = replace(
        digits_fact(), name="mnist", mean=mnist.mean, std=mnist.std, test_sha256=data.test_sha256(mnist)
    )
    run = save_run(tmp_path / "run", module, masks, name="lenet300-100", input_shape=(1, 28, 28), fact=fact)
    result = validate(build(run), data_dir=mnist_dir)
    check_gates(result)
    assert result.score is not None
    assert result.score.n_samples == 10_000
    assert result.score == result.torch_score


def test_the_helpers_accuracy_is_the_recorded_one(sparse: Bundle) -> None:
    assert sparse.info.score == digits_accuracy(network_and_masks()[0])


@pytest.mark.parametrize(
    ("n_outputs", "why"),
    [
        (1, r"bundle has one output, so its top-1 accuracy cannot be computed"),
        (5, r"The labels of the test set of digits run from 0 to 9, outside the class numbers 0 to 4"),
    ],
)
def test_labels_that_do_not_fit_the_network_are_refused_before_anything_runs(
    n_outputs: int, why: str, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(copied, signature=class_signature((1, 8, 8), n_outputs))
    for call in ("open_session", "score", "golden_parity_of"):
        monkeypatch.setattr(VALIDATING, call, lambda *_, **__: pytest.fail("the network was run"))
    with pytest.raises(UsageError, match=why):
        validate(copied, trust=sha256_file(copied / "manifest.json"))


def test_without_a_test_set_the_table_says_so_and_shows_no_accuracy(copied: Path) -> None:
    rewrite(copied, data=None, score=None)
    text = str(validate(copied))
    assert re.search(r"test data +none\n", text)
    assert "accuracy" not in text


def test_one_output_has_no_largest_to_agree_on(sparse: Bundle) -> None:
    wanted = np.linspace(0, 1, 8, dtype=np.float32)[:, None]
    for outputs in (wanted, wanted[:, 0]):
        parity = parity_of({"logits": outputs}, {"logits": outputs}, sparse)
        assert (parity.ok, parity.top1_agreement) == (True, None)
    assert "% of 8" not in parity_text(parity)
    assert parity_text(parity).endswith("spread), 8 samples")


# ---- networks with several inputs and outputs


def test_every_output_is_held_to_the_golden_pair_and_to_the_run(tmp_path: Path) -> None:
    bundle = tagger_bundle(tmp_path / "b")
    found = validate(bundle)
    check_gates(found)
    assert [(one.name, one.ok, one.equal_share) for one in found.golden.outputs] == [
        ("scores", True, None),
        ("tags", True, 1.0),
    ]
    assert found.golden.n_samples == 8
    assert "8 samples; tags 100.000 % equal" in str(found)
    with open_session(bundle.onnx_path, signature=bundle.info.signature) as session:
        batches = parity_by_batch(session, bundle, session)
    assert [(one.batch, one.max_abs_difference, one.ok) for one in batches] == [
        (n, 0.0, True) for n in (1, 2, 3, 8)
    ]


def test_wrong_integers_fail_the_gate_by_their_share(tmp_path: Path) -> None:
    bundle = tagger_bundle(tmp_path / "b", tagged="words")
    found = validate(bundle)
    scores, tags = found.golden.outputs
    assert scores.ok
    assert tags.equal_share is not None
    assert 0.2 < tags.equal_share < 0.9
    share = f"{100 * (1 - tags.equal_share):.3g}"
    with pytest.raises(
        GateFailed, match=f": {share} % of tags differ from the golden pair, more than 0.03 %"
    ):
        check_gates(found)
    assert f"tags {100 * tags.equal_share:.3f} % equal" in str(found)
    json.dumps(asdict(found), allow_nan=False)


def test_nan_in_one_of_the_outputs_fails_at_once(tmp_path: Path) -> None:
    table = TABLE.copy()
    table[4] = np.nan
    bundle = tagger_bundle(tmp_path / "b", table=table)
    with pytest.raises(GateFailed, match=r"gives NaN or infinity in scores for \d of 8 samples"):
        validate(bundle)
