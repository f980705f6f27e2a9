"""Networks of any inputs and outputs become graphs that give the same for every free size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from sparse_export.errors import UsageError
from sparse_export.graph.example import Example, example_of_shape, make_example
from sparse_export.graph.example_sources import example_from_arrays, example_from_function
from sparse_export.graph.export import onnx_from_module
from sparse_export.graph.layers import graph_layers
from sparse_export.graph.named_network import NamedNetwork, run_module
from sparse_export.graph.tensor_arrays import array_from_tensor

BATCHES = tuple({"batch": n} for n in (1, 2, 3, 8))


def exported(
    module: nn.Module, example: Example, sizes: tuple[Mapping[str, int], ...] = BATCHES
) -> onnx.ModelProto:
    """The graph of a network, which gives the network's outputs at other sizes than those of the example."""
    module.eval()
    model = onnx_from_module(module, example, masks={})
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    named = NamedNetwork(module, example)
    for some in sizes:
        tensors = example.with_sizes(some).tensors
        feeds = {name: array_from_tensor(one) for name, one in tensors.items()}
        wanted = run_module(named, feeds)
        found = dict(zip((one.name for one in session.get_outputs()), session.run(None, feeds), strict=True))
        assert list(found) == list(wanted)
        for name, array in wanted.items():
            assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
            largest = float(np.abs(array.astype(np.float64)).max())
            np.testing.assert_allclose(
                found[name], array, rtol=1e-4, atol=1e-4 * max(1.0, largest), err_msg=f"{name} at {some}"
            )
    return model


def ends(model: onnx.ModelProto) -> dict[str, list[str | int]]:
    return {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }


def initializers(model: onnx.ModelProto) -> dict[str, np.ndarray[Any, Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


class Words(nn.Module):
    """A small encoder of words with a table of 16 positions and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, 8), nn.Embedding(16, 8)
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        places = self.places(torch.arange(input_ids.shape[1], device=input_ids.device))
        x = self.words(input_ids) + places
        hidden = attention_mask[:, None, :] == 0
        scores = self.query(x) @ self.key(x).transpose(1, 2) / 8**0.5
        x = self.norm(x + scores.masked_fill(hidden, -1e9).softmax(-1) @ self.value(x))
        return {"states": (x,), "pooled": {"logits": self.head(x.mean(1)), "loss": None}}


SIZES = {"input_ids": ("batch", "sequence"), "attention_mask": ("batch", "sequence")}


def words(**sizes: Any) -> tuple[Words, Example]:
    torch.manual_seed(4)
    ids = torch.randint(0, 20, (2, 5))
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[1, 3:] = 0
    network = Words().eval()
    inputs = {"input_ids": ids, "attention_mask": mask}
    return network, make_example(network, (), inputs, free_sizes=sizes or SIZES)


def test_two_inputs_of_integers_with_a_free_length() -> None:
    network, example = words()
    sizes = tuple({"batch": n, "sequence": length} for n, length in ((1, 1), (2, 9), (3, 16), (8, 4)))
    model = exported(network, example, sizes)
    assert ends(model) == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
        "states.0": ["batch", "sequence", 8],
        "pooled.logits": ["batch", 3],
    }
    assert example.sizes == {"sequence": 5}


def test_every_parameter_has_its_name_and_its_bytes() -> None:
    network, example = words()
    model = onnx_from_module(network, example, masks={})
    stored = initializers(model)
    turned = ("query.weight", "key.weight", "value.weight")  # MatMul takes them so
    for name, parameter in network.named_parameters():
        wanted = parameter.detach().numpy()
        np.testing.assert_array_equal(stored[name], wanted.T if name in turned else wanted)
    assert {layer.weight for layer in graph_layers(model) if layer.constant} == {*turned, "head.weight"}


class Branches(nn.Module):
    """Depends on the length of its input in a way of the test's own."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change, self.linear = change, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.linear(self.change(x))
        return scores


def longer(x: Tensor) -> Tensor:
    return x + 1 if x.shape[1] > 6 else x


def fixed(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], 5, 4)


def square(x: Tensor) -> Tensor:
    return x * x.new_ones(x.shape[1])[:, None] if x.shape[0] == x.shape[1] else -x


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            longer,
            r"the size length at test_any_network\.py, line \d+ .*traced for length <= 6, .* at length 7",
        ),
        (fixed, r"the size length at test_any_network\.py, .*length.*, which is false at length 4\."),
        (square, r"depends on the batch size at .*\(`return x \* x.*batch != length"),
    ],
)
def test_a_branch_on_another_free_size_is_refused_and_named(
    change: Callable[[Tensor], Tensor], told: str
) -> None:
    network = Branches(change)
    example = make_example(network, (torch.zeros(2, 5, 4),), free_sizes={"x": ("batch", "length", None)})
    with pytest.raises(UsageError, match=told):
        onnx_from_module(network, example, masks={})


def even_pictures(x: Tensor) -> Tensor:
    halves: Tensor = x.unflatten(1, (-1, 2))
    return halves.flatten(1, 2)


def only_of_one(x: Tensor) -> Tensor:
    return x.flatten(1).reshape(x.shape) if x.shape[1] == 1 else x


@pytest.mark.parametrize("change", [even_pictures, only_of_one])
def test_limits_of_forward_and_branches_without_effect_are_no_reason(
    change: Callable[[Tensor], Tensor],
) -> None:
    network = Branches(change)
    example = make_example(network, (torch.randn(2, 4, 4),), free_sizes={"x": ("batch", "length", None)})
    exported(network, example, ({"batch": 3, "length": 2}, {"batch": 1, "length": 6}))


@dataclass
class Boxes:
    places: Tensor
    scores: Tensor
    names: list[str] | None = None


class Pair(NamedTuple):
    mean: Tensor
    spread: Tensor


class Returns(nn.Module):
    """Returns what the test makes of its two outputs and its input."""

    def __init__(self, made: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.made, self.first, self.second = made, nn.Linear(6, 4), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        return self.made(self.first(x), self.second(x), x)


@pytest.mark.parametrize(
    ("made", "names"),
    [
        (lambda a, b, x: a, ["logits"]),
        (lambda a, b, x: (a,), ["logits"]),
        (lambda a, b, x: a.argmax(1), ["output"]),
        (lambda a, b, x: a[:, None], ["output"]),
        (lambda a, b, x: (a, None, b), ["output_0", "output_2"]),
        (lambda a, b, x: [a, (b, x)], ["output_0", "output_1.0", "output_1.1"]),
        (lambda a, b, x: Boxes(places=a, scores=b), ["places", "scores"]),
        (lambda a, b, x: Pair(a, b), ["mean", "spread"]),
        (lambda a, b, x: {"out": a, "aux": [b, {"deep": a}]}, ["out", "aux.0", "aux.1.deep"]),
        (lambda a, b, x: {"x": a, "same": x}, ["x_", "same"]),
    ],
)
def test_outputs_are_named_as_forward_returns_them(made: Callable[..., Any], names: list[str]) -> None:
    network = Returns(made)
    model = exported(network, make_example(network, (torch.randn(2, 6),)))
    assert [value.name for value in model.graph.output] == names
    assert ends(model)["x"] == ["batch", 6]


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda a, b, x: {"out": a, "n": 3}, "returns an int as n"),
        (lambda a, b, x: Boxes(places=a, scores=b, names=["cat"]), r"returns a str as names\.0"),
        (lambda a, b, x: None, "returns no tensor"),
    ],
)
def test_what_is_no_tensor_is_refused_by_its_name(made: Callable[..., Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        onnx_from_module(Returns(made), example_of_shape((6,)), masks={})


class Keywords(nn.Module):
    """Takes keywords alone: a list, a mapping, None and numbers, of many types."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.offset = nn.Buffer(torch.arange(4.0))

    def forward(
        self,
        *,
        pictures: list[Tensor],
        more: Mapping[str, Tensor],
        scale: float,
        kind: str,
        empty: Tensor | None = None,
    ) -> dict[str, Tensor]:
        assert empty is None
        x = pictures[0].float() / 255 + pictures[1].to(torch.float32)
        kept = torch.where(more["kept"], self.linear(x), -x) * scale
        return {"kept": kept, "count": more["count"] * 2, "offset": self.offset}


def test_lists_mappings_and_other_types_are_taken_by_keyword() -> None:
    network = Keywords()
    inputs = {
        "pictures": [torch.randint(0, 255, (2, 4), dtype=torch.uint8), torch.randn(2, 4).half()],
        "more": {"kept": torch.tensor([[True], [False]]), "count": torch.arange(2, dtype=torch.int32)},
        "scale": 2.0,
        "kind": "any",
        "empty": None,
    }
    model = exported(network, make_example(network, (), inputs))
    assert ends(model) == {
        "pictures.0": ["batch", 4],
        "pictures.1": ["batch", 4],
        "more.kept": ["batch", 1],
        "more.count": ["batch"],
        "kept": ["batch", 4],
        "count": ["batch"],
        "offset": [4],
    }


class TiedWords(nn.Module):
    """Scores words by the table that it looks them up in, and has a layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.mix, self.again, self.score = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.again.weight, self.score.weight = self.mix.weight, self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        scores: Tensor = self.score(self.again(torch.relu(self.mix(self.table(ids)))))
        return scores


def test_tied_weights_have_their_first_name() -> None:
    network = TiedWords()
    example = make_example(network, (torch.arange(6).reshape(2, 3),), free_sizes={"ids": ("batch", "length")})
    model = exported(network, example, ({"batch": 1, "length": 7},))
    found = initializers(model)
    assert {"table.weight", "mix.weight"} <= set(found)
    assert not {"score.weight", "again.weight"} & set(found)
    np.testing.assert_array_equal(found["table.weight"], network.table.weight.detach().numpy())


def test_a_mask_of_a_tied_weight_names_it_whichever_it_is_for() -> None:
    network = TiedWords()
    example = make_example(network, (torch.arange(6).reshape(2, 3),))
    mask = torch.rand(8, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    model = onnx_from_module(network, example, masks={"again.weight": mask})
    np.testing.assert_array_equal(initializers(model)["again.weight"].T != 0, mask.numpy())
    table = torch.rand(12, 8, generator=torch.Generator().manual_seed(2)) < 0.5
    model = onnx_from_module(network, example, masks={"score.weight": table})  # a MatMul past a Transpose
    np.testing.assert_array_equal(initializers(model)["score.weight"] != 0, table.numpy())


class Named(nn.Module):
    """A parameter that has the name of an input, another that of a node."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.randn(4))
        self.relu, self.linear = nn.Parameter(torch.randn(4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x + self.x)) * self.relu


def test_names_of_inputs_and_of_nodes_that_are_parameters_too() -> None:
    network = Named()
    model = exported(network, make_example(network, (torch.randn(2, 4),)))
    assert set(initializers(model)) == {"x_", "relu", "linear.weight", "linear.bias"}


class InTurn(nn.Module):
    """Batch norms behind products of every rank, with what torch puts between."""

    def __init__(self) -> None:
        super().__init__()
        self.turned, self.turned_norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.flat, self.flat_norm = nn.Linear(8, 4, bias=False), nn.BatchNorm1d(4)
        self.conv, self.conv_norm = nn.Conv1d(4, 6, 1, groups=2), nn.BatchNorm1d(6)
        self.up, self.up_norm = nn.ConvTranspose1d(6, 4, 2, groups=2), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.turned_norm(self.turned(x).transpose(1, 2)).transpose(1, 2))
        flat = self.flat_norm(self.flat(y).reshape(-1, 4)).reshape(-1, 5, 4)
        y = self.conv_norm(self.conv(torch.relu(flat).transpose(1, 2)))
        scores: Tensor = self.up_norm(self.up(torch.relu(y)))
        return scores


def test_batch_norms_are_folded_past_nodes_that_only_move() -> None:
    torch.manual_seed(6)
    network = InTurn()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm1d):
            part.running_mean, part.running_var = (
                torch.randn(part.num_features),
                torch.rand(part.num_features),
            )
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
    model = exported(network, make_example(network, (torch.randn(2, 5, 6),)))
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    masks = {
        name: torch.rand(one.shape, generator=torch.Generator().manual_seed(3)) < 0.5
        for name, one in network.named_parameters()
        if one.dim() > 1
    }
    model = onnx_from_module(network, make_example(network, (torch.randn(2, 5, 6),)), masks=masks)
    counts = {name: np.count_nonzero(initializers(model)[name]) for name in masks}
    assert counts == {name: int(mask.sum()) for name, mask in masks.items()}


class Takes(nn.Module):
    def forward(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        return first if second is None else first + second


def test_what_a_users_function_returns_is_positional_or_by_keyword_or_both() -> None:
    x, y = torch.zeros(3, 2), torch.ones(3, 2)
    made: Any
    for made in (
        x,
        (x,),
        {"first": x},
        ((x,), {}),
        ((), {"first": x}),
    ):
        example = example_from_function(Takes(), lambda made=made: made)  # type: ignore[misc]
        assert (list(example.tensors), example.all_sizes) == (["first"], {"batch": 3})
    example = example_from_function(Takes(), lambda: ((x,), {"second": y}))
    assert torch.equal(example.call(Takes()), x + y)


def test_a_users_function_that_fails_is_told() -> None:
    with pytest.raises(UsageError, match=r"example_inputs\(\) failed with ZeroDivisionError"):

        def example_inputs() -> Tensor:
            return torch.zeros(1 // 0)

        example_from_function(Takes(), example_inputs)


def test_arrays_are_parameters_by_their_names_and_one_alone_by_any() -> None:
    x = np.zeros((2, 3), dtype=ml_dtypes.bfloat16)
    example = example_from_arrays(Takes(), {"second": x, "first": x})
    assert [one.dtype for one in example.tensors.values()] == [torch.bfloat16] * 2
    example = example_from_arrays(Takes(), {"pixels": x})
    assert list(example.axes.items()) == [("pixels", ("batch", None))]
    np.testing.assert_array_equal(array_from_tensor(example.tensors["pixels"]), x)


@pytest.mark.parametrize(
    ("inputs", "free_sizes", "told"),
    [
        ({"third": torch.zeros(2)}, None, "cannot be called with the example.*It takes first, second"),
        ({"first": object()}, None, "first of the example is of type object"),
        ({"first": torch.zeros(2, dtype=torch.complex64)}, None, "first of the example is complex64"),
        ({"first": torch.zeros(2)}, {"input": ("batch",)}, "names 'input', which is no input"),
        ({"first": torch.zeros(2)}, {"first": ("batch", None)}, r"example has shape \(2,\)"),
        ({"first": torch.zeros(2, 3)}, {"first": ("batch", 4)}, r"example has shape \(2, 3\)"),
        ({"first": torch.zeros(2)}, {"first": "a"}, "free_sizes of first is 'a'"),
        (
            {"first": torch.zeros(2)},
            {"first": {0: "batch"}},
            r"is \{0: 'batch'\}.*Write it like \('batch', None\)",
        ),
        ({"first": torch.zeros(2)}, ["batch"], r"free_sizes is \['batch'\].*A mapping was expected"),
        ({"first": torch.zeros(2)}, {"first": 2}, "free_sizes of first is 2"),
        ({"first": torch.zeros(1)}, {"first": ("batch",)}, "batch is 1 in the example"),
        (
            {"first": torch.zeros(2), "second": torch.zeros(3)},
            {"first": ("n",), "second": ("n",)},
            "n is 2 in first and 3 in second",
        ),
    ],
)
def test_an_example_that_cannot_be_used_is_refused(inputs: Any, free_sizes: Any, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        make_example(Takes(), (), inputs, free_sizes=free_sizes)


def test_without_free_sizes_the_first_axis_is_the_batch_where_all_inputs_share_it() -> None:
    shared = make_example(Takes(), (torch.zeros(2, 5), torch.zeros(2)))
    assert shared.axes == {"first": ("batch", None), "second": ("batch",)}
    for other in (torch.zeros(3), torch.zeros(1, 5)):
        assert make_example(Takes(), (torch.zeros(2, 5), other)).all_sizes == {}
    scalar = make_example(Takes(), (torch.zeros(2, 5), torch.tensor(1.0)))
    assert scalar.axes == {"first": ("batch", None), "second": ()}


def test_feeds_of_another_type_or_without_an_input_are_refused() -> None:
    named = NamedNetwork(Takes(), make_example(Takes(), (torch.zeros(2),)))
    with pytest.raises(UsageError, match="first is float64"):
        run_module(named, {"first": np.zeros(2)})
    with pytest.raises(UsageError, match="first is missing"):
        run_module(named, {})
