"""A model file is held to the network on the golden input, whole and in batches of 1, 2 and 3."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper, parser
from torch import Tensor, nn

from sparse_export.building.golden import Golden, golden_pair, require_parity, write_golden
from sparse_export.errors import GateFailed, UsageError
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.runtimes.torch_session import TorchSession
from sparse_export.signature import Feeds, class_signature
from tests.tagging import SIGNATURE as TAGGER
from tests.tagging import save_tagger

_GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
net (float[batch, 4] input) => (float[batch, 3] logits) {
    right = Gemm <transB: int = 1> (input, weight, bias)
    n = Shape <start: int = 0, end: int = 1> (input)
    same = Equal (n, wrong_at)
    wrong = Cast <to: int = 1> (same)
    any_wrong = ReduceMax <keepdims: int = 0> (wrong)
    logits = Add (right, any_wrong)
}
"""

SIGNATURE = class_signature((4,), 3)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3).eval()


@pytest.fixture
def golden(network: nn.Module) -> Golden:
    return golden_pair(TorchSession(network, SIGNATURE))


def _model(file: Path, network: nn.Module, wrong_at: list[int]) -> Path:
    """Write the network as ONNX, with 1 added to all logits at some batch sizes."""
    model = parser.parse_model(_GRAPH)
    for name in ("weight", "bias"):
        values = network.get_parameter(name).detach().numpy()
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    model.graph.initializer.append(numpy_helper.from_array(np.array(wrong_at, np.int64), "wrong_at"))
    onnx.save(model, file)
    return file


def test_torch_answers_the_same_inputs_in_smaller_batches(network: nn.Module, golden: Golden) -> None:
    assert list(golden.smaller) == [1, 2, 3]
    for n, found in golden.smaller.items():
        with torch.no_grad():
            wanted = network(torch.from_numpy(golden.inputs["input"][:n])).numpy()
        np.testing.assert_array_equal(found["logits"], wanted)


def test_a_graph_that_is_right_at_every_batch_size_passes(
    network: nn.Module, golden: Golden, tmp_path: Path
) -> None:
    require_parity(_model(tmp_path / "m.onnx", network, [5]), SIGNATURE, golden, 3e-4)


@pytest.mark.parametrize(
    ("wrong_at", "told"),
    [
        ([1], "at batch 1 and agrees at batch 2, 3 and 8"),
        ([2], "at batch 2 and agrees at batch 1, 3 and 8"),
        ([1, 3], "at batch 1 and 3 and agrees at batch 2 and 8"),
        ([8], "at batch 8 and agrees at batch 1, 2 and 3"),
    ],
)
def test_batch_sizes_at_which_a_graph_is_wrong_are_named(
    wrong_at: list[int], told: str, network: nn.Module, golden: Golden, tmp_path: Path
) -> None:
    with pytest.raises(GateFailed, match=f"differs from the network {told}"):
        require_parity(_model(tmp_path / "m.onnx", network, wrong_at), SIGNATURE, golden, 3e-4)


def test_a_graph_that_is_wrong_at_every_size_is_told_by_how_much(
    network: nn.Module, golden: Golden, tmp_path: Path
) -> None:
    with pytest.raises(GateFailed, match=r"differs from the network by 1 in logits on 8 inputs"):
        require_parity(_model(tmp_path / "m.onnx", network, [1, 2, 3, 8]), SIGNATURE, golden, 3e-4)


def test_a_root_mean_square_beyond_its_own_limit_is_refused(
    network: nn.Module, golden: Golden, tmp_path: Path
) -> None:
    wrong = _model(tmp_path / "m.onnx", network, [1, 2, 3, 8])
    require_parity(wrong, SIGNATURE, golden, 100.0)
    told = r"by a root mean square of [\d.e+-]+ of the spread of logits on 8 inputs"
    with pytest.raises(GateFailed, match=told) as caught:
        require_parity(wrong, SIGNATURE, golden, 100.0, 0.02)
    assert "a root mean square of 0.02" in caught.value.expected


def test_real_inputs_are_asked_for_only_where_there_were_none(
    network: nn.Module, golden: Golden, tmp_path: Path
) -> None:
    wrong = _model(tmp_path / "m.onnx", network, [1, 2, 3, 8])
    real = golden_pair(TorchSession(network, SIGNATURE), golden.inputs)
    for pair, words in ((golden, r"give real inputs by --inputs\.$"), (real, r"nothing was written\.$")):
        with pytest.raises(GateFailed, match=words):
            require_parity(wrong, SIGNATURE, pair, 3e-4)


@pytest.mark.parametrize("sample", [0, 2, 6])
def test_a_sample_that_is_wrong_in_every_batch_is_no_matter_of_the_batch_size(
    sample: int, network: nn.Module, golden: Golden, tmp_path: Path
) -> None:
    for answer in (golden.outputs, *golden.smaller.values()):
        answer["logits"][sample : sample + 1] += 0.5
    with pytest.raises(GateFailed, match=r"differs from the network by 0\.5 in logits on 8 inputs"):
        require_parity(_model(tmp_path / "m.onnx", network, [5]), SIGNATURE, golden, 3e-4)


def test_a_graph_that_cannot_run_a_batch_size_is_told_so(
    network: nn.Module, golden: Golden, tmp_path: Path
) -> None:
    file = _model(tmp_path / "m.onnx", network, [5])
    model = onnx.load(file)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 8
    onnx.save(model, file)
    with pytest.raises(GateFailed, match="at batch 1, 2 and 3 and agrees at batch 8"):
        require_parity(file, SIGNATURE, golden, 3e-4)


class Pairs(nn.Module):
    """Takes an even number of samples alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x) // 2, 2, 4).flatten(0, 1)


def test_a_network_that_does_not_take_every_batch_size_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"Pairs does not take inputs \(1, 4\).*input float32 \(batch, 4\).*batch size"
    ):
        golden_pair(TorchSession(Pairs(), class_signature((4,), 4)))


def test_the_inputs_are_the_first_of_samples_where_there_are_some(network: nn.Module) -> None:
    samples = np.arange(40, dtype=np.float32).reshape(10, 4)
    golden = golden_pair(TorchSession(network, SIGNATURE), {"input": samples})
    np.testing.assert_array_equal(golden.inputs["input"], samples[:8])
    assert golden.outputs["logits"].shape == (8, 3)


def test_nan_in_an_output_is_refused_with_what_it_was_run_on(network: nn.Module) -> None:
    with torch.no_grad():
        network.get_parameter("bias")[1] = torch.nan
    with pytest.raises(GateFailed, match="On standard normal inputs the network gives NaN"):
        golden_pair(TorchSession(network, SIGNATURE))


# ---- networks with several inputs and outputs


def _tagger_pair(folder: Path) -> Golden:
    with open_session(save_tagger(folder / "reference.onnx"), signature=TAGGER) as session:
        return golden_pair(session)


def test_integers_are_drawn_within_their_range_and_every_output_is_stored(tmp_path: Path) -> None:
    golden = _tagger_pair(tmp_path)
    ids = golden.inputs["ids"]
    assert ids.shape == (8, 6)
    assert ids.dtype == np.int64
    assert set(ids.ravel().tolist()) == {0, 1, 2, 3, 4}
    assert {name: one.shape for name, one in golden.outputs.items()} == {"scores": (8, 6, 3), "tags": (8, 6)}
    assert {n: one["tags"].shape for n, one in golden.smaller.items()} == {n: (n, 6) for n in (1, 2, 3)}
    written = write_golden(tmp_path, golden)
    assert written.inputs == {"ids": "golden/input-0.npy", "mask": "golden/input-1.npy"}
    assert written.outputs == {"scores": "golden/output-0.npy", "tags": "golden/output-1.npy"}
    for name, file in written.outputs.items():
        np.testing.assert_array_equal(np.load(tmp_path / file), golden.outputs[name])


def test_without_a_range_of_its_integers_a_network_needs_real_inputs(tmp_path: Path) -> None:
    ids, mask = TAGGER.inputs
    unknown = replace(TAGGER, inputs=(replace(ids, low=None, high=None), mask))
    with open_session(save_tagger(tmp_path / "m.onnx"), signature=unknown) as session:
        with pytest.raises(UsageError, match=r"does not tell which integers its input ids .* --inputs"):
            golden_pair(session)
        feeds: Feeds = {"ids": np.ones((2, 3), np.int64), "mask": np.ones((2, 3), np.float32)}
        golden = golden_pair(session, feeds)
    assert list(golden.smaller) == [1, 2]  # of two samples no batch of three is made
    require_parity(tmp_path / "m.onnx", unknown, golden, 3e-4)


def test_integer_outputs_are_held_by_the_share_that_is_equal(tmp_path: Path) -> None:
    golden = _tagger_pair(tmp_path)
    wrong = save_tagger(tmp_path / "wrong.onnx", tagged="words")  # the tags differ where the mask is negative
    differs = float((golden.inputs["mask"] < 0).mean())
    assert 0.2 < differs < 0.8
    require_parity(wrong, TAGGER, golden, 1.0)
    with pytest.raises(
        GateFailed,
        match=rf"differs from the network by {differs:.3g} of tags on 8 inputs.*a share of 0\.0003.*real inputs by --inputs",
    ):
        require_parity(wrong, TAGGER, golden, 3e-4)


def test_a_graph_that_draws_random_numbers_is_refused(tmp_path: Path) -> None:
    graph = """
    <ir_version: 10, opset_import: ["" : 20]>
    noisy (float[batch, 4] input) => (float[batch, 4] logits) {
        noise = RandomNormalLike (input)
        logits = Add (input, noise)
    }
    """
    onnx.save(parser.parse_model(graph), tmp_path / "m.onnx")
    with (
        open_session(tmp_path / "m.onnx") as session,
        pytest.raises(UsageError, match="gives another logits each time it runs"),
    ):
        golden_pair(session)


def test_a_graph_without_a_batch_axis_is_held_at_its_one_size(tmp_path: Path) -> None:
    graph = """
    <ir_version: 10, opset_import: ["" : 20]>
    fixed (float[1, 4] input) => (float[1, 4] output) { output = Tanh (input) }
    """
    onnx.save(parser.parse_model(graph), tmp_path / "m.onnx")
    with open_session(tmp_path / "m.onnx") as session:
        signature = session.signature
        golden = golden_pair(session)
    assert (golden.inputs["input"].shape, golden.smaller) == ((1, 4), {})
    require_parity(tmp_path / "m.onnx", signature, golden, 3e-4)
    golden.outputs["output"][0, 0] += 0.5
    with pytest.raises(GateFailed, match=r"by 0\.5 in output on 1 input"):
        require_parity(tmp_path / "m.onnx", signature, golden, 3e-4)


def test_a_value_inside_the_graph_is_compared_and_stored_apart(tmp_path: Path) -> None:
    file = save_tagger(tmp_path / "m.onnx")
    with open_session(file, signature=TAGGER, inner=("words",)) as session:
        golden = golden_pair(session, inner=("words",))
    assert write_golden(tmp_path, golden).inner == {"words": "golden/inner.npy"}
    require_parity(file, TAGGER, golden, 3e-4)
    golden.outputs["words"][3] += 9.0
    with pytest.raises(GateFailed, match="by 9 in words"):
        require_parity(file, TAGGER, golden, 3e-4)


class _LateNoise(nn.Module):
    """Random in the last samples of a large batch alone."""

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.zeros_like(x)
        noise[4:] = torch.randn_like(noise[4:])
        return x + noise


def test_randomness_that_smaller_batches_do_not_show_is_found_too() -> None:
    said: list[str] = []
    with pytest.raises(UsageError, match="gives another logits each time it runs"):
        golden_pair(
            TorchSession(_LateNoise(), class_signature((4,), 4)), suspected=lambda: said.append("looked")
        )
    assert said == ["looked"]
