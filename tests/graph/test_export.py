"""The exported graph is the network, with every masked weight +0.0."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from sparse_export import models
from sparse_export.errors import GateFailed, UsageError
from sparse_export.graph import export
from sparse_export.graph.capture import Captured
from sparse_export.graph.example import example_of_shape
from sparse_export.graph.export import onnx_from_module, remove_source_notes
from tests.making_runs import network_and_masks, stir_batch_norm

Array = np.ndarray[Any, Any]


def random_masks(module: nn.Module, density: float = 0.4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(parameter.shape, generator=generator) < density
        for name, parameter in module.named_parameters()
        if parameter.dim() > 1
    }


def masked(module: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    with torch.no_grad():
        for name, mask in masks.items():
            module.get_parameter(name).mul_(mask)
    return module.eval()


def run(model: onnx.ModelProto, x: Array) -> Array:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: Array = session.run(["logits"], {"input": x})[0]
    return found


def assert_same_output(
    model: onnx.ModelProto, module: nn.Module, shape: tuple[int, ...], batch: int = 3
) -> None:
    x = np.random.default_rng(0).standard_normal((batch, *shape), dtype=np.float32)
    with torch.no_grad():
        wanted = module.eval()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(run(model, x), wanted, rtol=1e-4, atol=1e-4 * max(1.0, np.abs(wanted).max()))


def weights(model: onnx.ModelProto) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, dict[str, Tensor], onnx.ModelProto]:
    module, masks = network_and_masks()
    return module, masks, onnx_from_module(module, example_of_shape((1, 8, 8)), masks=masks)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_the_graph_gives_the_networks_logits_for_any_batch(digits: Any, batch: int) -> None:
    module, _, model = digits
    assert_same_output(model, module, (1, 8, 8), batch)


def test_the_interface_and_versions_are_pinned(digits: Any) -> None:
    model = digits[2]
    assert [value.name for value in model.graph.input] == ["input"]
    assert [value.name for value in model.graph.output] == ["logits"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    assert model.ir_version == 10
    assert model.producer_name == "sparse-export"


def test_the_input_shape_is_known_everywhere_in_the_graph(digits: Any) -> None:
    known = {value.name for value in digits[2].graph.value_info}
    made = {name for node in digits[2].graph.node for name in node.output} - {"logits"}
    assert made <= known


def test_batch_norm_is_folded_away(digits: Any) -> None:
    assert {node.op_type for node in digits[2].graph.node} == {"Conv", "Relu", "MaxPool", "Reshape", "Gemm"}


def test_masked_weights_are_positive_zero_and_kept_ones_are_not_zero(digits: Any) -> None:
    _, masks, model = digits
    found = weights(model)
    assert len(masks) == 5
    for name, mask in masks.items():
        bits = found[name].view(np.uint32)
        assert (bits[~mask.numpy()] == 0).all()
        assert (bits[mask.numpy()] & 0x7FFFFFFF != 0).all()


def test_a_negative_batch_norm_scale_leaves_no_negative_zero_anywhere(digits: Any) -> None:
    module, _, model = digits
    assert (module.bn1.weight < 0).any()
    for values in weights(model).values():
        if values.dtype == np.float32:
            assert not ((values == 0) & np.signbit(values)).any()


def test_negative_zeros_of_the_network_become_positive() -> None:
    module = models.create("lenet300-100")
    with torch.no_grad():
        module.get_parameter("fc3.weight").fill_(-0.0)
    model = onnx_from_module(module, example_of_shape((1, 28, 28)), masks={})
    assert (weights(model)["fc3.weight"].view(np.uint32) == 0).all()


def test_masks_are_applied_to_weights_that_are_not_zero_yet() -> None:
    torch.manual_seed(0)
    module = models.create("lenet300-100")
    masks = random_masks(module)
    model = onnx_from_module(module, example_of_shape((1, 28, 28)), masks=masks)
    assert np.count_nonzero(weights(model)["fc1.weight"]) == int(masks["fc1.weight"].sum())
    assert_same_output(model, masked(module, masks), (1, 28, 28))


def test_the_network_itself_is_not_changed() -> None:
    module, masks = network_and_masks()
    module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    parts = {name: type(part) for name, part in module.named_modules()}
    onnx_from_module(
        module, example_of_shape((1, 8, 8)), masks={name: mask & False for name, mask in masks.items()}
    )
    assert module.training
    assert parts == {name: type(part) for name, part in module.named_modules()}
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_exporting_twice_gives_the_same_bytes(digits: Any) -> None:
    module, masks, model = digits
    again = onnx_from_module(module, example_of_shape((1, 8, 8)), masks=masks)
    assert again.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


_IN_ANOTHER_PROCESS = """
import hashlib
from sparse_export.graph.example import example_of_shape
from sparse_export.graph.export import onnx_from_module
from sparse_export.graph.named_network import NamedNetwork
from tests.making_runs import network_and_masks
module, masks = network_and_masks()
content = onnx_from_module(module, example_of_shape((1, 8, 8)), masks=masks).SerializeToString(deterministic=True)
print(hashlib.sha256(content).hexdigest())
"""


def test_another_process_gives_the_same_bytes(digits: Any) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _IN_ANOTHER_PROCESS], cwd=root, check=True, capture_output=True, text=True
    )
    here = hashlib.sha256(digits[2].SerializeToString(deterministic=True)).hexdigest()
    assert done.stdout == f"{here}\n"


def test_the_graph_tells_nothing_of_the_users_folders(digits: Any) -> None:
    content = digits[2].SerializeToString()
    assert str(Path(__file__).parents[2]).encode() not in content
    assert b".py" not in content
    assert {entry.key for entry in digits[2].metadata_props} == {"producer", "producer_version"}


def test_exporting_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    onnx_from_module(models.create("lenet300-100"), example_of_shape((1, 28, 28)), masks={})
    assert capfd.readouterr() == ("", "")


class Sequence(nn.Module):
    """Linear layers on (batch, steps, features): stored transposed in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(6, 6)
        self.plain = nn.Linear(6, 6, bias=False)
        self.own = nn.Parameter(torch.randn(6, 6))
        self.other = nn.Parameter(torch.randn(6, 6))
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(torch.relu(self.wide(x)))
        x = nn.functional.linear(nn.functional.linear(x, self.own), self.other)
        logits: Tensor = self.head(x.mean(1))
        return logits


class PastTheLayer(nn.Module):
    """Multiplies by the weights of its layers without calling them, as torchvision's Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 6)
        self.proj = nn.Linear(6, 6)
        self.called = nn.Linear(6, 6)
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(x, self.qkv.weight, self.qkv.bias)
        x = nn.functional.linear(torch.relu(x), self.proj.weight)
        logits: Tensor = self.head(self.called(x).mean(1))
        return logits


class Tied(nn.Module):
    """Two linear layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.second(torch.relu(self.first(x)))
        return logits


class Branching(nn.Module):
    """Cannot be traced by torch.fx, so that folding is left to the exporter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 2:
            raise ValueError("two channels, please")
        logits: Tensor = self.norm(self.conv(x)).mean((2, 3))
        return logits


class TwiceUsed(nn.Module):
    """The convolution's output is also used without batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        logits: Tensor = (self.norm(y) + y).mean((2, 3))
        return logits


class SharedWeight(nn.Module):
    """Two convolutions with one weight, the first followed by batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.second = nn.Conv2d(2, 2, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.second(self.norm(self.first(x))).mean((2, 3))
        return logits


class StepNorm(nn.Module):
    """Batch norm over the steps of a sequence, which is not the axis of the linear layer's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.norm(self.linear(x)).mean(1)
        return logits


class Upward(nn.Module):
    """A transposed convolution with groups, and one without, each with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 3, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.more = nn.ConvTranspose2d(6, 4, 2)
        self.more_norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.more_norm(self.more(self.norm(self.up(x)))).mean((2, 3))
        return logits


class LinearNorm(nn.Module):
    """Linear layers with batch norm, on (batch, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.norm(self.linear(x))))
        return logits


class PlainNorms(nn.Module):
    """Batch norms that neither scale nor shift, after layers with a bias and without."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, bias=False)
        self.conv_norm = nn.BatchNorm2d(4, affine=False)
        self.linear = nn.Linear(4, 8, bias=False)
        self.linear_norm = nn.BatchNorm1d(8, affine=False)
        self.wide = nn.Linear(8, 8)
        self.wide_norm = nn.BatchNorm1d(8, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv_norm(self.conv(x))).mean((2, 3))
        logits: Tensor = self.wide_norm(self.wide(torch.relu(self.linear_norm(self.linear(x)))))
        return logits


_NETWORKS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (Sequence, (5, 6)),
    (PastTheLayer, (5, 6)),
    (Tied, (6,)),
    (Branching, (2, 6, 6)),
    (TwiceUsed, (2, 6, 6)),
    (SharedWeight, (2, 8, 8)),
    (StepNorm, (5, 6)),
    (Upward, (4, 3, 3)),
    (LinearNorm, (6,)),
    (PlainNorms, (2, 6, 6)),
]


@pytest.mark.parametrize(("make", "shape"), _NETWORKS)
def test_networks_of_other_shapes_keep_their_function_and_zeros(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(2)
    module = make().eval()
    stir_batch_norm(module)
    masks = random_masks(module)
    model = onnx_from_module(module, example_of_shape(shape), masks=masks)
    assert_same_output(model, masked(module, masks), shape)
    n_masked = sum(int((~mask).sum()) for mask in masks.values())
    stored = [values for values in weights(model).values() if values.ndim > 1 and values.dtype == np.float32]
    assert sum(int((values.view(np.uint32) == 0).sum()) for values in stored) == n_masked


def test_a_norm_without_a_scale_is_folded_like_any_other() -> None:
    model = onnx_from_module(PlainNorms(), example_of_shape((2, 6, 6)), masks={})
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}


class Copies(nn.Module):
    """Layers that nobody has trained: torch's encoder begins with copies of one layer.

    And two that are all zero.
    """

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.dead = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x).mean(1)
        logits: Tensor = self.head(x + self.dead(x))
        return logits


def test_each_layer_has_its_own_weight_where_several_are_equal() -> None:
    torch.manual_seed(3)
    module = Copies().eval()
    masks = {
        name: torch.ones_like(p, dtype=torch.bool) for name, p in module.named_parameters() if p.dim() > 1
    }
    with torch.no_grad():
        for name in ("dead.0.weight", "dead.2.weight"):
            masks[name].zero_()
            module.get_parameter(name).zero_()
    model = onnx_from_module(module, example_of_shape((5, 8)), masks=masks)
    used = [one for node in model.graph.node for one in node.input]
    assert {name: used.count(name) for name in masks} == dict.fromkeys(masks, 1)
    assert_same_output(model, module, (5, 8))


def test_a_channel_that_batch_norm_scales_by_zero_may_vanish() -> None:
    module, masks = network_and_masks()
    with torch.no_grad():
        module.get_parameter("bn2.weight")[3] = 0.0
    model = onnx_from_module(module, example_of_shape((1, 8, 8)), masks=masks)
    assert not weights(model)["conv2.weight"][3].any()
    assert weights(model)["conv2.weight"][2].any()


def test_a_kept_weight_that_is_zero_in_the_network_is_allowed() -> None:
    module, masks = network_and_masks()
    with torch.no_grad():
        module.get_parameter("fc1.weight")[masks["fc1.weight"]] = 0.0
    model = onnx_from_module(module, example_of_shape((1, 8, 8)), masks=masks)
    assert not weights(model)["fc1.weight"].any()


def _spoilt(monkeypatch: pytest.MonkeyPatch, change: Callable[[Array], None]) -> None:
    """Let the exporter's graph have another fc1.weight than the network."""
    genuine = export._exported

    def exported(found: Captured) -> ir.Model:
        model = genuine(found)
        weight = model.graph.initializers["network.fc1.weight"]
        assert weight.const_value is not None
        values = weight.const_value.numpy().copy()
        change(values)
        weight.const_value = ir.tensor(values, name=weight.name)
        return model

    monkeypatch.setattr(export, "_exported", exported)


def test_a_masked_weight_that_came_back_fails_the_gate_and_names_the_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, masks = network_and_masks()
    where = tuple((~masks["fc1.weight"]).nonzero()[0].tolist())
    _spoilt(monkeypatch, lambda values: values.__setitem__(where, 1e-30))
    with pytest.raises(GateFailed, match=r"1 masked weights of fc1\.weight"):
        onnx_from_module(module, example_of_shape((1, 8, 8)), masks=masks)


def test_a_kept_weight_that_was_lost_fails_the_gate_and_names_the_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, masks = network_and_masks()
    where = tuple(masks["fc1.weight"].nonzero()[0].tolist())
    _spoilt(monkeypatch, lambda values: values.__setitem__(where, 0.0))
    with pytest.raises(GateFailed, match=r"1 kept weights of fc1\.weight"):
        onnx_from_module(module, example_of_shape((1, 8, 8)), masks=masks)


class Unused(nn.Module):
    """Has a weight that the output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(6, 4)
        self.unused = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.used(x)
        return logits


def test_a_masked_weight_that_the_graph_does_not_have_fails_the_gate() -> None:
    module = Unused()
    with pytest.raises(GateFailed, match=r"unused\.weight is not the weight of.*--keep-dense"):
        onnx_from_module(
            module, example_of_shape((6,)), masks={"unused.weight": torch.ones(4, 6, dtype=torch.bool)}
        )


def test_a_mask_for_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(UsageError, match=r"a mask for 'fc9\.weight'"):
        onnx_from_module(
            models.create("lenet5"), example_of_shape((1, 28, 28)), masks={"fc9.weight": torch.ones(1)}
        )


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(UsageError, match=r"fc2\.weight has shape \(1,\)"):
        onnx_from_module(
            models.create("lenet5"), example_of_shape((1, 28, 28)), masks={"fc2.weight": torch.ones(1)}
        )


def test_a_network_in_half_precision_is_refused() -> None:
    with pytest.raises(UsageError, match=r"fc1\.weight is torch\.float16"):
        onnx_from_module(models.create("lenet300-100").half(), example_of_shape((1, 28, 28)), masks={})


class DataDependent(nn.Module):
    """Chooses by a value, which a graph cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x) if x.sum() > 0 else -self.linear(x)
        return logits


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_network_that_cannot_be_traced_is_told_in_one_line() -> None:
    with pytest.raises(UsageError, match="The network DataDependent cannot be exported") as caught:
        onnx_from_module(DataDependent(), example_of_shape((6,)), masks={})
    assert "\n" not in caught.value.what


def test_a_wrong_input_shape_is_refused() -> None:
    with pytest.raises(UsageError, match="LeNet5 cannot be exported"):
        onnx_from_module(models.create("lenet5"), example_of_shape((1, 8, 8)), masks={})


class Sequences(nn.Module):
    """A linear layer on sequences, whose weight the exporter stores transposed under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 16)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(torch.relu(self.mix(x)).mean(1))
        return logits


def test_a_masked_weight_has_its_parameters_name_also_where_it_is_stored_transposed() -> None:
    module = Sequences()
    masks = random_masks(module)
    model = onnx_from_module(module, example_of_shape((5, 8)), masks=masks)
    stored = weights(model)
    assert set(masks) <= set(stored)
    np.testing.assert_array_equal(stored["mix.weight"].T != 0, masks["mix.weight"].numpy())
    assert_same_output(model, masked(module, masks), (5, 8))


class NamedLikeTheEnds(nn.Module):
    """A parameter and a buffer that have the names of the graph's ends."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.input = nn.Parameter(torch.randn(6))
        self.register_buffer("logits", torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x + self.input) * self.logits
        return logits


def test_a_parameter_may_have_the_name_of_an_end_of_the_graph() -> None:
    module = NamedLikeTheEnds()
    masks = {"linear.weight": torch.rand(4, 6) < 0.5}
    model = onnx_from_module(module, example_of_shape((6,)), masks=masks)
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["input", "logits"]
    assert set(weights(model)) == {"linear.weight", "linear.bias", "input_", "logits_"}
    assert_same_output(model, masked(module, masks), (6,))


def test_a_masked_weight_with_the_name_of_an_end_is_refused() -> None:
    module = NamedLikeTheEnds()
    with pytest.raises(UsageError, match="mask for the parameter input"):
        onnx_from_module(module, example_of_shape((6,)), masks={"input": torch.ones(6)})


class _Chosen(nn.Module):
    """A branch, whose nodes have texts too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.cond(x.sum() > 0, lambda y: self.layer(y), lambda y: -self.layer(y), (x,))
        return found


def test_paths_of_the_machine_that_a_file_was_exported_on_are_removed(tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    torch.onnx.export(_Chosen().eval(), (torch.ones(2, 4),), str(file), dynamo=True, verbose=False)
    model = onnx.load(file)
    node = model.graph.node[0]
    node.doc_string = f'  File "{__file__}", line 1'
    node.metadata_props.add(key="mine", value="kept")
    model.metadata_props.add(key="labels", value="cat,dog")
    here = str(Path(__file__).parent).encode()
    assert here in model.SerializeToString()
    remove_source_notes(model)
    assert here not in model.SerializeToString()
    assert [one.value for one in model.graph.node[0].metadata_props if one.key == "mine"] == ["kept"]
    assert [one.value for one in model.metadata_props] == ["cat,dog"]
