"""Which channels may change places, and that any permutation of those keeps the function."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from sparse_export import models
from sparse_export.graph.channels import rules
from sparse_export.graph.channels.groups import find_channels
from sparse_export.graph.channels.orders import apply_record, record_of
from sparse_export.graph.channels.spaces import Channels
from tests.graph import networks as nets
from tests.making_runs import stir_batch_norm
from tests.many import many

Net = Callable[[], nn.Module]


def random_record(channels: Channels, seed: int = 0) -> dict[str, Any]:
    """A random permutation of every free space, none of them the identity."""
    generator = torch.Generator().manual_seed(seed)
    chosen = {}
    for space in channels.free:
        permutation = torch.randperm(space.width, generator=generator)
        if torch.equal(permutation, torch.arange(space.width)):
            permutation = permutation.roll(1)
        chosen[space.name] = permutation
    return record_of(channels, chosen)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stirred(module: nn.Module) -> nn.Module:
    """In float64, no two channels alike: a constant is the same in every order."""
    module.double().eval()
    stir_batch_norm(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def moves_and_keeps_the_function(module: nn.Module, x: Tensor) -> Channels:
    """Permute every free space at random, in a float64 network, and undo it."""
    stirred(module)
    x = x.double() if x.is_floating_point() else x
    channels = find_channels(module, x)
    before, expected = state(module), module(x)
    record = random_record(channels)
    apply_record(module, record)
    permuted = module(x)
    assert (permuted - expected).abs().max() <= 1e-10 * expected.abs().max()
    named = {member["tensor"] for entry in record["spaces"] for member in entry["members"]}
    canonical = set(dict(module.named_parameters())) | set(dict(module.named_buffers()))
    changed = {name for name, tensor in state(module).items() if not torch.equal(tensor, before[name])}
    assert changed & canonical == named
    apply_record(module, record, inverse=True)
    assert same(state(module), before)
    return channels


def widths(channels: Channels) -> list[int]:
    return sorted(space.width for space in channels.free)


IMAGES, TOKENS = (2, 3, 6, 6), (2, 5, 6)


@pytest.mark.parametrize(
    ("make", "shape", "expected"),
    [
        (nets.Framed, IMAGES, [8]),
        (nets.Flipped, IMAGES, []),
        (nets.Rolled, IMAGES, []),
        (nets.ScaledByBuffer, IMAGES, [8]),
        (nets.ScaledByPlace, IMAGES, []),
        (nets.HalvesSwapped, IMAGES, [4, 4]),
        (nets.HalvesMultiplied, IMAGES, []),
        (nets.HalvesWithoutBias, IMAGES, []),
        (nets.SpreadInput, IMAGES, []),
        (nets.RawAndEmbedded, TOKENS, []),
        (nets.Gated, IMAGES, []),
        (nets.Shuffled, IMAGES, [3, 5]),
        (nets.PixelShuffled, IMAGES, []),
        (nets.MeanOverChannels, IMAGES, [8]),
        (nets.SoftmaxOverChannels, IMAGES, [8]),
        (nets.LargestChannel, IMAGES, []),
        (nets.Cumulated, IMAGES, []),
        (nets.ChosenByBuffer, IMAGES, [6]),  # channel 2 is not chosen, channel 1 twice
        (nets.Norms, IMAGES, [4, 4]),
        (nets.CalledTwice, IMAGES, [8]),
        (nets.FoldedIntoBatch, IMAGES, []),
        (nets.FunctionalWeight, IMAGES, [8, 8]),
        (nets.ComputedWeight, IMAGES, []),
        (nets.WeightNormed, IMAGES, []),
        (nets.ReadElsewhere, IMAGES, []),
        (nets.Transposed, IMAGES, [4, 4, 6, 6, 8]),
        (nets.Filled, IMAGES, [8]),
        (nets.TrainedOtherwise, IMAGES, [8]),
        (lambda: nets.Transformer(nets.Attention()), TOKENS, [8, 8, 16, 24]),
        (lambda: nets.Transformer(nets.Attention(own=True)), TOKENS, [8, 8, 16, 24]),
        (lambda: nets.Transformer(nn.MultiheadAttention(16, 2, batch_first=True)), TOKENS, [8, 8, 16, 24]),
        (nets.Mixer, TOKENS, [16]),
        (nets.Bilinear, (2, 6), []),
        (nets.Recurrent, TOKENS, []),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_spaces_of_networks_that_are_hard_in_one_way(
    make: Net, shape: tuple[int, ...], expected: list[int]
) -> None:
    channels = moves_and_keeps_the_function(make(), torch.randn(shape))
    assert channels.untraced == ""
    assert widths(channels) == expected


def test_a_tied_embedding_moves_as_one() -> None:
    tokens = torch.randint(0, 11, (2, 7))
    assert widths(moves_and_keeps_the_function(nets.TiedEmbedding(), tokens)) == [16, 24]


def test_what_only_training_reads_moves_too() -> None:
    (space,) = find_channels(nets.TrainedOtherwise(), torch.randn(IMAGES)).free
    columns = next(m.slots for m in space.members if m.name == "other.weight" and m.axis == 1)
    rows = next(m.slots for m in space.members if m.name == "first.weight")
    assert torch.equal(columns, 7 - rows)  # it reads them flipped


class AuxiliaryHead(nn.Module):
    """In training a second head reads the same channels, the last of them by itself, and some are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.auxiliary = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 2))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = nn.functional.dropout(torch.relu(self.norm(self.first(x))), 0.0, self.training)
        if self.training:
            return self.last(x), self.auxiliary(x) * x[:, 7:]
        return cast("Tensor", self.last(x))


class DroppingOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(torch.relu(self.first(x)), 0.5, self.training)
        return cast("Tensor", self.last(x))


def outputs_in_both_modes(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Of evaluation, and of training, where nothing is dropped; the network stays as it is."""
    found: list[Tensor] = []
    for is_training in (False, True):
        network = copy.deepcopy(module).train(is_training)
        for part in network.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        with torch.no_grad():
            found += [one for one in tree_leaves(network(x)) if isinstance(one, Tensor)]
    return found


def moves_in_both_modes(module: nn.Module, x: Tensor) -> Channels:
    stirred(module)
    x = x.double()
    expected = outputs_in_both_modes(module, x)
    channels = find_channels(module, x)
    apply_record(module, random_record(channels))
    permuted = outputs_in_both_modes(module, x)
    assert len(permuted) == len(expected)
    for before, after in zip(expected, permuted, strict=True):
        assert (after - before).abs().max() <= 1e-10 * before.abs().max()
    return channels


def test_an_auxiliary_head_moves_with_what_it_reads_or_pins_it() -> None:
    channels = moves_in_both_modes(AuxiliaryHead(), torch.randn(4, 6))
    assert widths(channels) == [7, 12]
    assert {(m.name, m.axis) for m in channels.free[0].members} >= {
        ("first.weight", 0),
        ("auxiliary.0.weight", 1),
    }


def test_what_is_dropped_in_training_alone_pins_nothing() -> None:
    assert widths(find_channels(DroppingOut(), torch.randn(3, 6))) == [8]


def test_parameters_of_zeros_and_ones_move_too() -> None:
    """A simplified graph leaves out what adds 0 or multiplies by 1, and training changes it."""
    module = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    nn.init.zeros_(module.get_parameter("0.bias"))
    (space,) = find_channels(module, torch.randn(2, 6)).free
    names = {m.name for m in space.members}
    assert names == {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight"}


def test_a_norm_by_the_statistics_of_the_batch_moves() -> None:
    norm = nn.BatchNorm2d(8, track_running_stats=False)
    module = nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.Conv2d(8, 2, 1)).double()
    nn.init.uniform_(norm.weight)
    x = torch.randn(IMAGES).double()
    channels, expected = find_channels(module, x), module(x)
    apply_record(module, random_record(channels))
    assert widths(channels) == [8]
    torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-10)


def test_inputs_and_outputs_stay() -> None:
    channels = find_channels(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8)), torch.randn(2, 4))
    (inner,) = channels.free
    assert {(m.name, m.axis) for m in inner.members} == {("0.weight", 0), ("0.bias", 0), ("1.weight", 1)}
    (output,) = (space for space in channels.spaces if not space.free)
    assert {(m.name, m.axis) for m in output.members} == {("1.weight", 0), ("1.bias", 0)}
    assert "output" in output.reason


def test_flattened_maps_move_in_blocks() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 2))
    (space,) = moves_and_keeps_the_function(module, torch.randn(IMAGES)).free
    (columns,) = (m.slots for m in space.members if m.name == "2.weight")
    assert columns.sort(1).values.tolist() == torch.arange(128).reshape(8, 16).tolist()


def test_what_keeps_channels_in_place_is_named_in_the_reason() -> None:
    channels = find_channels(nets.Cumulated(), torch.randn(IMAGES))
    assert any("CumSum node_cumsum works along the channels" in space.reason for space in channels.spaces)


def test_what_moves_beside_what_stays_is_said() -> None:
    channels = find_channels(nets.RawAndEmbedded(), torch.randn(TOKENS))
    assert any("some of what it reads moves and some does not" in space.reason for space in channels.spaces)


def test_a_network_that_cannot_be_exported_has_no_spaces_and_a_reason() -> None:
    channels = find_channels(nets.Branching(), torch.randn(2, 6))
    assert channels.spaces == ()
    assert "cannot be exported: GuardOnDataDependentSymNode" in channels.untraced


@pytest.mark.parametrize("error", [KeyError, IndexError, RuntimeError, AttributeError])
def test_a_fault_of_a_rule_is_an_error_and_no_unknown_operation(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise error("a fault of ours")

    monkeypatch.setattr(rules, "linear", fails)
    with pytest.raises(error, match="a fault of ours"):
        find_channels(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 6))


class FailsWhenTraced(nn.Module):
    """Its operation runs in the forward and fails in the graph, where the number of calls is a constant."""

    n_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.n_calls += 1
        return x.reshape(2, 6 if self.n_calls == 1 else 7)


def test_a_network_whose_graph_fails_has_no_spaces_and_a_reason() -> None:
    channels = find_channels(FailsWhenTraced(), torch.randn(2, 6))
    assert (channels.spaces, "RuntimeError" in channels.untraced) == ((), True)


class OddCalls(nn.Module):
    """Calls that are right, and not as most write them."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.call(self, self.first(x)))
        return logits


@pytest.mark.parametrize(
    "call",
    [
        lambda _, x: torch.matmul(input=x, other=torch.ones(8, 8).to(x)),
        lambda _, x: torch.matmul(torch.ones(2, 2).to(x), x),
        lambda _, x: torch.cat(tensors=[x, x], dim=1)[:, :8],
        lambda _, x: torch.flip(input=x, dims=(1,)),
        lambda _, x: torch.where(x > 0)[0][:1] * 0 + x,
        lambda _, x: nn.functional.linear(torch.ones(2, 8).to(x), torch.ones(8, 8).to(x)) + x,
        lambda _, x: torch.ones(2, 8, dtype=torch.float16).type_as(x) + x,
        lambda _, x: nn.functional.softmax(input=x, dim=1),
        lambda _, x: torch.relu_(input=x),
        lambda _, x: x.unsqueeze(dim=0).squeeze(dim=0),
        lambda _, x: torch.stack((x, x)).mean(dim=0),
    ],
)
def test_calls_in_odd_forms_keep_the_function(call: Callable[[nn.Module, Tensor], Tensor]) -> None:
    moves_and_keeps_the_function(OddCalls(call), torch.randn(2, 6))


def test_a_hooked_layer_stays() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    module[1].register_forward_hook(lambda part, args, out: out * torch.arange(8.0))
    assert find_channels(module, torch.randn(2, 4)).free == ()


def test_tensors_that_share_memory_stay() -> None:
    module = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False))
    module[2].weight = nn.Parameter(module.get_parameter("0.weight").detach().t())
    assert find_channels(module, torch.randn(2, 8)).free == ()


def test_a_subclass_with_its_own_forward_is_not_taken_for_its_parent() -> None:
    class Reversed(nn.ReLU):
        def forward(self, input: Tensor) -> Tensor:
            return input.flip(-1).abs() * input

    module = nn.Sequential(nn.Linear(4, 8), Reversed(), nn.Linear(8, 2))
    assert moves_and_keeps_the_function(module, torch.randn(3, 4)).free == ()


def test_looking_leaves_the_network_as_it_was() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Conv2d(8, 2, 1))
    module[1].eval()
    before, modes = state(module), [part.training for part in module.modules()]
    random, attributes = torch.get_rng_state(), set(vars(module))
    x = torch.randn(IMAGES)
    kept, random = x.clone(), torch.get_rng_state()
    assert len(find_channels(module, x).free) == 1
    assert same(state(module), before)
    assert [part.training for part in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert set(vars(module)) == attributes
    assert torch.equal(x, kept)
    assert not parametrize.is_parametrized(module)


# Networks made by hypothesis


@st.composite
def _networks(draw: st.DrawFn) -> nn.Module:
    """A chain of blocks of 8 channels, and a head of one of three kinds."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    n = 8

    def conv(n_in: int, n_out: int, groups: int = 1) -> nn.Module:
        return nn.Conv2d(n_in, n_out, 3, padding=1, groups=groups, bias=draw(st.booleans()))

    def block() -> nn.Module:
        kind = draw(
            st.sampled_from(["plain", "residual", "concat", "grouped", "depthwise", "squeeze", "norm"])
        )
        if kind == "residual":
            return nets.Residual(nn.Sequential(block(), conv(n, n)))
        if kind == "concat":
            k = draw(st.integers(1, n - 1))
            return nn.Sequential(nets.Branches(conv(n, k), nn.Identity()), nn.ReLU(), conv(n + k, n))
        if kind == "grouped":
            return conv(n, n, groups=draw(st.sampled_from([2, 4])))
        if kind == "depthwise":
            return nn.Sequential(conv(n, 2 * n, groups=n), conv(2 * n, n))
        if kind == "squeeze":
            return nets.Squeeze(n, 3)
        if kind == "norm":
            return nn.Sequential(nn.BatchNorm2d(n), nn.ReLU6())
        return nn.Sequential(conv(n, n), nn.Hardswish(inplace=True))

    blocks = [block() for _ in range(draw(st.integers(1, 4)))]
    heads: dict[str, Callable[[], list[nn.Module]]] = {
        "flatten": lambda: [nn.Flatten(), nn.Linear(16 * n, 4)],
        "pooled": lambda: [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, 6), nn.Linear(6, 4)],
        "map": lambda: [nn.MaxPool2d(2), nn.ConvTranspose2d(n, 4, 2)],
    }
    head = heads[draw(st.sampled_from(sorted(heads)))]()
    return nn.Sequential(conv(3, n), *blocks, *head)


@many(40, every_day=4)
@given(_networks())
def test_random_permutations_keep_the_function_and_can_be_undone(module: nn.Module) -> None:
    channels = moves_and_keeps_the_function(module, torch.randn(2, 3, 4, 4))
    assert channels.untraced == ""


@st.composite
def _mixtures(draw: st.DrawFn) -> nn.Module:
    torch.manual_seed(draw(st.integers(0, 2**20)))
    operation = st.tuples(st.sampled_from(sorted(nets.OPERATIONS)), st.integers(0, 3))
    return nets.Mixture(draw(st.lists(operation, min_size=1, max_size=6)))


@many(60, every_day=4)
@given(_mixtures())
def test_whatever_operations_do_to_channels_the_function_stays(module: nn.Module) -> None:
    assert moves_and_keeps_the_function(module, torch.randn(2, 3, 4, 4)).untraced == ""


# Networks that people use


def _vision(name: str, **options: Any) -> nn.Module:
    from torchvision import models as vision

    module: nn.Module = getattr(vision, name)(weights=None, **options)
    return module


def _segmentation(name: str, **options: Any) -> nn.Module:
    from torchvision.models import segmentation

    module: nn.Module = getattr(segmentation, name)(weights=None, **options)
    return module


def _vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    module: nn.Module = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=7
    )
    return module


def _dense_net() -> nn.Module:
    from torchvision.models import DenseNet

    module: nn.Module = DenseNet(growth_rate=4, block_config=(2, 3), num_init_features=8, num_classes=7)
    return module


@pytest.mark.parametrize(
    ("make", "shape", "n_free"),
    [
        (lambda: models.create("lenet300-100"), (2, 1, 28, 28), 2),
        (lambda: models.create("lenet5"), (2, 1, 28, 28), 3),
        (lambda: models.create("digits-cnn"), (2, 1, 8, 8), 4),
        (lambda: _vision("resnet18", num_classes=10), (2, 3, 32, 32), 12),
        (lambda: _vision("mobilenet_v2", num_classes=10, width_mult=0.25), (2, 3, 32, 32), 24),
        (lambda: _vision("shufflenet_v2_x0_5", num_classes=10), (2, 3, 32, 32), 80),
        (_dense_net, (2, 3, 32, 32), 12),
        (_vit, (2, 3, 32, 32), 7),
    ],
)
def test_free_spaces_of_known_networks(make: Net, shape: tuple[int, ...], n_free: int) -> None:
    assert len(moves_and_keeps_the_function(make(), torch.randn(shape)).free) == n_free


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "n_free"),
    [
        (lambda: _vision("googlenet", init_weights=False, aux_logits=True), 61),
        pytest.param(
            lambda: _segmentation("deeplabv3_resnet50", weights_backbone=None, aux_loss=True),
            45,
            marks=pytest.mark.full,
        ),
    ],
    ids=["googlenet", "deeplabv3_resnet50"],
)
def test_networks_with_auxiliary_heads_keep_the_function_in_both_modes(make: Net, n_free: int) -> None:
    assert len(moves_in_both_modes(make(), torch.randn(2, 3, 64, 64)).free) == n_free


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize(
    ("make", "shape", "n_free"),
    [
        (lambda: models.create("vgg-like"), (2, 3, 32, 32), 14),
        (lambda: models.create("wrn-16-8"), (2, 3, 32, 32), 10),
        (lambda: _vision("resnet50"), (2, 3, 32, 32), 37),
        (lambda: _vision("densenet121"), (2, 3, 32, 32), 120),
        (lambda: _vision("mobilenet_v3_small"), (2, 3, 32, 32), 27),
        (lambda: _vision("convnext_tiny"), (2, 3, 32, 32), 22),
        (lambda: _vision("swin_t"), (2, 3, 32, 32), 154),
    ],
)
def test_free_spaces_of_large_networks(make: Net, shape: tuple[int, ...], n_free: int) -> None:
    assert len(moves_and_keeps_the_function(make(), torch.randn(shape)).free) == n_free
