"""A model file is held to the network on the golden input, whole and in batches of 1, 2 and 3."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper, parser
from torch import Tensor, nn

from sparse_export.building.golden import Golden, golden_pair, require_parity
from sparse_export.errors import GateFailed, UsageError

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


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3).eval()


@pytest.fixture
def golden(network: nn.Module) -> Golden:
    return golden_pair(network, (4,), [])


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
            wanted = network(torch.from_numpy(golden.inputs[:n])).numpy()
        np.testing.assert_array_equal(found, wanted)


def test_a_graph_that_is_right_at_every_batch_size_passes(
    network: nn.Module, golden: Golden, tmp_path: Path
) -> None:
    require_parity(_model(tmp_path / "m.onnx", network, [5]), golden, 3e-4)


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
        require_parity(_model(tmp_path / "m.onnx", network, wrong_at), golden, 3e-4)


def test_a_graph_that_is_wrong_at_every_size_is_told_by_how_much(
    network: nn.Module, golden: Golden, tmp_path: Path
) -> None:
    with pytest.raises(GateFailed, match=r"differs from the network by 1 on 8 inputs"):
        require_parity(_model(tmp_path / "m.onnx", network, [1, 2, 3, 8]), golden, 3e-4)


@pytest.mark.parametrize("sample", [0, 2, 6])
def test_a_sample_that_is_wrong_in_every_batch_is_no_matter_of_the_batch_size(
    sample: int, network: nn.Module, golden: Golden, tmp_path: Path
) -> None:
    for answer in (golden.outputs, *golden.smaller.values()):
        answer[sample : sample + 1] += 0.5
    with pytest.raises(GateFailed, match=r"differs from the network by 0\.5 on 8 inputs"):
        require_parity(_model(tmp_path / "m.onnx", network, [5]), golden, 3e-4)


def test_a_graph_that_cannot_run_a_batch_size_is_told_so(
    network: nn.Module, golden: Golden, tmp_path: Path
) -> None:
    file = _model(tmp_path / "m.onnx", network, [5])
    model = onnx.load(file)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 8
    onnx.save(model, file)
    with pytest.raises(GateFailed, match="at batch 1, 2 and 3 and agrees at batch 8"):
        require_parity(file, golden, 3e-4)


class Pairs(nn.Module):
    """Takes an even number of samples alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x) // 2, 2, 4).flatten(0, 1)


def test_a_network_that_does_not_take_every_batch_size_is_refused() -> None:
    with pytest.raises(UsageError, match=r"Pairs does not take inputs \(1, 4\).*Every batch size"):
        golden_pair(Pairs(), (4,), [])
