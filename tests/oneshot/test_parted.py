"""A graph with its values beside it: the same graph, whose values are shared and let go one by one."""

from __future__ import annotations

import weakref

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparse_export.errors import ArtefactError
from sparse_export.graph.example import example_of_shape
from sparse_export.graph.export import onnx_from_module
from sparse_export.graph.model import prepared, signature_of
from sparse_export.oneshot.graph_pruning import sparsify_graph
from sparse_export.oneshot.parted import filled, parted
from sparse_export.oneshot.unused import unused_weights
from sparse_export.sparsity.pattern import NMPattern
from tests.oneshot.graphs import drawn, model_from, outputs_of

TWO_FOUR = NMPattern(n=2, m=4)
GRAPH = """(float[N,64] x) => (float[N,64] y) {
    a = MatMul(x, first)
    b = Add(a, shift)
    y = MatMul(b, second)
}"""


def chain() -> onnx.ModelProto:
    model = model_from(
        GRAPH, first=drawn(64, 64, seed=1), second=drawn(64, 64, seed=2), shift=drawn(64, seed=3)
    )
    model.graph.initializer[0].doc_string = "a note"
    return model


def test_it_is_put_together_as_it_was() -> None:
    model = chain()
    halves = numpy_helper.from_array(drawn(64, 64).astype(np.float16), "second")
    model.graph.initializer[1].CopyFrom(halves)
    found = parted(model)
    assert set(found.values) == {"first", "second"}
    assert found.model.ByteSize() < 2000
    assert found.whole() == model
    assert parted(found).whole() == model
    for tensor in found.model.graph.initializer:
        wanted = numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == tensor.name))
        assert np.array_equal(found.read(tensor), wanted)
        assert np.array_equal(numpy_helper.to_array(filled(tensor, found.read(tensor))), wanted)


def test_a_replaced_value_is_let_go_and_a_copy_keeps_its_own() -> None:
    found = parted(chain())
    copy = found.copied()
    first = next(one for one in found.model.graph.initializer if one.name == "first")
    was = weakref.ref(found.values["first"])
    other = drawn(64, 64, seed=9)
    found.put(first, other)
    assert np.array_equal(found.read(first), other)
    assert was() is not None
    assert copy.values["first"] is was()
    del copy
    assert was() is None


def test_data_that_were_not_read_are_told() -> None:
    model = chain()
    first = model.graph.initializer[0]
    first.ClearField("raw_data")
    first.data_location = TensorProto.EXTERNAL
    first.external_data.add(key="location", value="weights.data")
    found = parted(model)
    assert set(found.values) == {"second"}
    with pytest.raises(ArtefactError, match="first lies in a file beside the model and was not read"):
        found.read(found.model.graph.initializer[0])
    assert found.whole() == model


def test_small_tensors_are_replaced_inside_the_graph() -> None:
    found = parted(chain())
    copy = found.copied()
    at = [one.name for one in found.model.graph.initializer].index("shift")
    found.put(found.model.graph.initializer[at], np.ones(64, np.float32))
    assert np.array_equal(found.read(found.model.graph.initializer[at]), np.ones(64))
    assert np.array_equal(copy.read(copy.model.graph.initializer[at]), drawn(64, seed=3))


def test_a_network_shares_what_its_graph_has_too() -> None:
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    exported = onnx_from_module(network, example_of_shape([64]), masks={}, fold=False, transpose=False)
    parameters = dict(network.named_parameters())
    found = parted(exported, parameters)
    assert set(found.values) == {"0.weight", "2.weight"}
    for name, array in found.values.items():
        assert np.shares_memory(array, parameters[name].detach().numpy())
    before = {name: one.detach().clone() for name, one in parameters.items()}
    changed = dict(parameters, **{"0.weight": parameters["0.weight"].detach() + 1})
    other = parted(exported, changed)
    assert np.array_equal(other.values["0.weight"], before["0.weight"].numpy())
    assert not np.shares_memory(other.values["0.weight"], changed["0.weight"].numpy())


def test_pruning_a_parted_graph_is_pruning_the_graph() -> None:
    model = prepared(chain())
    batches = [{"x": drawn(40, 64, seed=n)} for n in (5, 6)]
    dense = parted(model)
    first = {name: array.copy() for name, array in dense.values.items()}
    one, other = (
        sparsify_graph(
            given,
            signature=signature_of(model),
            batches=batches,
            pattern=TWO_FOUR,
            method="reconstruction",
            planned_dense={},
        )
        for given in (model, dense)
    )
    assert one.model == other.model
    assert [layer.error for layer in one.layers] == [layer.error for layer in other.layers]
    assert all(np.array_equal(dense.values[name], array) for name, array in first.items())
    wanted = outputs_of(one.model, batches[0])[0]
    assert not np.allclose(wanted, outputs_of(model, batches[0])[0])


class _RunAgain(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second, self.aux = (nn.Linear(8, 8) for _ in range(3))
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = checkpoint(self.second, self.first(x), use_reentrant=self.reentrant)
        assert isinstance(found, torch.Tensor)
        return found


def test_weights_of_a_part_that_is_run_again_are_used() -> None:
    x = torch.zeros(2, 8)
    assert unused_weights(_RunAgain(reentrant=False), x) == ["aux.weight"]
    assert unused_weights(_RunAgain(reentrant=True), x) == []
