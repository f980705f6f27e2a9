"""The networks known by name."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from sparse_export import models
from sparse_export.errors import UnknownNameError, UsageError
from sparse_export.train.layers import maskable_parameters

# Weights, and the tensors that they are in.
SIZES = {
    "lenet300-100": (266_200, 3),
    "lenet5": (430_500, 4),
    "digits-cnn": (40_208, 5),
    "alexnet-s": (5_066_784, 8),
    "alexnet-b": (8_484_896, 8),
    "vgg-c": (11_307_712, 16),
    "vgg-d": (15_239_872, 16),
    "vgg-like": (14_977_728, 15),
    "wrn-28-2": (1_463_984, 29),
    "wrn-22-8": (17_147_312, 23),
    "wrn-16-8": (10_954_160, 17),
    "wrn-16-10": (17_107_632, 17),
    "resnet18": (11_678_912, 21),
    "resnet34": (21_779_648, 37),
    "resnet50": (25_502_912, 54),
    "vit-b-16": (86_292_480, 50),
    "vit-l-16": (303_800_320, 98),
}
IMAGENET = ("resnet18", "resnet34", "resnet50", "vit-b-16", "vit-l-16")
OURS = tuple(name for name in SIZES if name not in IMAGENET)
ONE_OF_EACH_KIND = ("lenet300-100", "lenet5", "digits-cnn", "alexnet-s", "vgg-c", "wrn-28-2", "resnet18")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # batches of two are too small to share: two threads take three times as long


def on_meta(name: str, n_classes: int | None = None) -> nn.Module:
    with torch.device("meta"):
        return models.create(name, n_classes).eval()


def test_the_table_in_the_docstring_lists_every_network_with_its_facts() -> None:
    table = [line for line in (models.__doc__ or "").splitlines() if line.startswith("    ")][1:]
    rows = [line.replace(", ", ",").split() for line in table]
    shown = {name: [str(models.spec(name).input_shape), str(models.spec(name).n_classes)] for name in SIZES}
    assert rows == [
        [name, shape.replace(" ", ""), n_classes, f"{SIZES[name][0]:,}", str(SIZES[name][1])]
        for name, (shape, n_classes) in shown.items()
    ]


def test_the_names_are_listed_in_the_order_of_the_table() -> None:
    assert models.names() == tuple(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_a_network_has_the_published_number_of_weights_and_tensors(name: str) -> None:
    weights = maskable_parameters(on_meta(name))
    assert (sum(value.numel() for value in weights.values()), len(weights)) == SIZES[name]


@pytest.mark.parametrize("name", OURS)
def test_a_network_gives_one_logit_for_each_class(name: str) -> None:
    spec = models.spec(name)
    with torch.no_grad():
        logits = models.create(name).eval()(torch.randn(2, *spec.input_shape))
    assert logits.shape == (2, spec.n_classes)
    assert logits.isfinite().all() and not torch.allclose(logits[0], logits[1])
    assert (logits < 0).any() and not torch.allclose(logits.exp().sum(1), torch.ones(2))


@pytest.mark.parametrize("name", SIZES)
def test_the_number_of_classes_can_be_replaced(name: str) -> None:
    images = torch.empty(2, *models.spec(name).input_shape, device="meta")
    assert on_meta(name, 7)(images).shape == (2, 7)
    assert on_meta(name)(images).shape == (2, models.spec(name).n_classes)


def test_replacing_the_number_of_classes_changes_the_last_layer_alone() -> None:
    for name in SIZES:
        own, replaced = (on_meta(name, n).state_dict() for n in (None, 7))
        assert list(own) == list(replaced)
        changed = [key for key, value in own.items() if value.shape != replaced[key].shape]
        assert changed == list(own)[-2:], name


@pytest.mark.parametrize("n_classes", [0, -3])
def test_fewer_than_one_class_is_refused_with_the_number(n_classes: int) -> None:
    with pytest.raises(UsageError, match=rf"for {n_classes} classes.*1 or more"):
        models.create("lenet5", n_classes)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("alexnet-s", (3, 32, 32)),
        ("vgg-like", (3, 32, 32)),
        ("wrn-28-2", (3, 16, 16)),
        ("resnet18", (3, 64, 64)),
    ],
)
def test_a_step_of_training_reaches_every_parameter(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    network = models.create(name, 10).train()
    functional.cross_entropy(network(torch.randn(2, *shape)), torch.tensor([3, 8])).backward()
    for key, value in network.named_parameters():
        assert value.grad is not None and value.grad.isfinite().all() and value.grad.any(), key


def test_resnet18_gives_a_thousand_logits() -> None:
    with torch.no_grad():
        logits = models.create("resnet18").eval()(torch.randn(2, 3, 224, 224))
    assert logits.shape == (2, 1000) and logits.isfinite().all() and logits.std() > 0


def test_the_vision_transformer_gives_logits_and_its_training_reaches_every_parameter() -> None:
    network = models.create("vit-b-16").eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert network(images).shape == (2, 1000)
    head = network.get_parameter("heads.head.weight")
    assert not head.any(), "torchvision starts the head at zero, so nothing below it learns in the first step"
    nn.init.normal_(head, std=0.02)
    layers = network.get_submodule("encoder.layers")
    assert isinstance(layers, nn.Sequential)
    del layers[2:]  # the others are alike
    functional.cross_entropy(network.train()(images[:1]), torch.tensor([3])).backward()
    for key, value in network.named_parameters():
        assert value.grad is not None and value.grad.isfinite().all() and value.grad.any(), key


@pytest.mark.parametrize("name", OURS)
def test_parameters_are_listed_in_the_order_of_the_forward_pass(name: str) -> None:
    network = on_meta(name)
    called: list[str] = []
    for layer_name, layer in network.named_modules():
        if layer._parameters:
            layer.register_forward_hook(lambda *_, layer_name=layer_name: called.append(layer_name))
    network(torch.empty(2, *models.spec(name).input_shape, device="meta"))
    assert list(dict.fromkeys(key.rpartition(".")[0] for key, _ in network.named_parameters())) == called


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("lenet300-100", "fc1 fc2 fc3"),
        ("lenet5", "conv1 conv2 fc1 fc2"),
        ("digits-cnn", "conv1 bn1 conv2 bn2 conv3 bn3 fc1 fc2"),
        ("alexnet-s", "conv1 bn1 conv2 bn2 conv3 bn3 conv4 bn4 conv5 bn5 fc1 bn6 fc2 bn7 fc3"),
        (
            "vgg-like",
            (
                "features.conv1_1 features.bn1_1 features.conv1_2 features.bn1_2"
                " features.conv2_1 features.bn2_1 features.conv2_2 features.bn2_2"
                " features.conv3_1 features.bn3_1 features.conv3_2 features.bn3_2 features.conv3_3 "
                "features.bn3_3"
                " features.conv4_1 features.bn4_1 features.conv4_2 features.bn4_2 features.conv4_3 "
                "features.bn4_3"
                " features.conv5_1 features.bn5_1 features.conv5_2 features.bn5_2 features.conv5_3 "
                "features.bn5_3"
                " classifier.fc1 classifier.bn1 classifier.fc2"
            ),
        ),
        (
            "wrn-16-8",
            (
                "conv1"
                " group1.0.bn1 group1.0.conv1 group1.0.bn2 group1.0.conv2 group1.0.shortcut"
                " group1.1.bn1 group1.1.conv1 group1.1.bn2 group1.1.conv2"
                " group2.0.bn1 group2.0.conv1 group2.0.bn2 group2.0.conv2 group2.0.shortcut"
                " group2.1.bn1 group2.1.conv1 group2.1.bn2 group2.1.conv2"
                " group3.0.bn1 group3.0.conv1 group3.0.bn2 group3.0.conv2 group3.0.shortcut"
                " group3.1.bn1 group3.1.conv1 group3.1.bn2 group3.1.conv2"
                " bn fc"
            ),
        ),
    ],
)
def test_layer_names_are_those_that_checkpoints_hold(name: str, layers: str) -> None:
    keys = [key.rpartition(".")[0] for key, _ in on_meta(name).named_parameters()]
    assert list(dict.fromkeys(keys)) == layers.split()


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(name: str) -> None:
    def first(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return next(models.create(name).parameters())

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_every_layer_of_the_digits_network_but_the_first_suits_two_four() -> None:
    columns = {name: value.shape[1] for name, value in maskable_parameters(on_meta("digits-cnn")).items()}
    assert [name for name, n in columns.items() if n % 16] == ["conv1.weight"]


def test_lenet5_pools_after_each_convolution_and_pads_nothing() -> None:
    net = models.create("lenet5").double()
    p = dict(net.named_parameters())
    x = torch.randn(3, 1, 28, 28, dtype=torch.float64)
    a = functional.max_pool2d(functional.conv2d(x, p["conv1.weight"], p["conv1.bias"]).clamp(min=0), 2)
    b = functional.max_pool2d(functional.conv2d(a, p["conv2.weight"], p["conv2.bias"]).clamp(min=0), 2)
    assert b.shape == (3, 50, 4, 4)
    c = (b.reshape(3, 800) @ p["fc1.weight"].T + p["fc1.bias"]).clamp(min=0)
    torch.testing.assert_close(net(x), c @ p["fc2.weight"].T + p["fc2.bias"])


def test_lenet300_100_flattens_images_row_by_row() -> None:
    net = models.create("lenet300-100")
    x = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(net(x), net(x.reshape(2, 784)))


def output_sides(name: str, kind: type[nn.Module]) -> list[int]:
    """Height of what each layer of a kind gives for one 32x32 image."""
    network = on_meta(name)
    sides: list[int] = []
    for layer in network.modules():
        if isinstance(layer, kind):
            layer.register_forward_hook(lambda _layer, _x, y: sides.append(y.shape[-2]))
    network(torch.empty(1, 3, 32, 32, device="meta"))
    return sides


@pytest.mark.parametrize(
    ("name", "kind", "sides"),
    [
        ("alexnet-b", nn.Conv2d, [13, 7, 4, 2, 1]),
        ("vgg-c", nn.MaxPool2d, [16, 8, 5, 3, 2]),
        ("vgg-d", nn.MaxPool2d, [16, 8, 4, 2, 1]),
    ],
)
def test_the_maps_shrink_as_published(name: str, kind: type[nn.Module], sides: list[int]) -> None:
    assert output_sides(name, kind) == sides


def test_vgg_c_has_three_pointwise_convolutions_and_vgg_d_none() -> None:
    def pointwise(name: str) -> list[str]:
        layers = on_meta(name).named_modules()
        return [key for key, layer in layers if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)]

    assert pointwise("vgg-c") == [f"features.conv{group}_3" for group in (3, 4, 5)]
    assert pointwise("vgg-d") == []


def test_a_wide_residual_block_adds_its_input_or_the_shortcut_of_the_activated_input() -> None:
    torch.manual_seed(2)
    network = models.create("wrn-28-2").double().eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)

    def block(key: str, x: torch.Tensor, stride: int, *, shortcut: bool) -> torch.Tensor:
        p = {name: network.get_parameter(f"{key}.{name}") for name in ("conv1.weight", "conv2.weight")}
        bn1, bn2 = (network.get_submodule(f"{key}.bn{i}") for i in (1, 2))
        activated = bn1(x).clamp(min=0)
        inner = bn2(functional.conv2d(activated, p["conv1.weight"], stride=stride, padding=1)).clamp(min=0)
        y = functional.conv2d(inner, p["conv2.weight"], padding=1)
        if shortcut:
            return y + functional.conv2d(
                activated, network.get_parameter(f"{key}.shortcut.weight"), stride=stride
            )
        return y + x

    x = torch.randn(2, 32, 8, 8, dtype=torch.float64)
    group2 = network.get_submodule("group2")
    expected = block("group2.0", x, 2, shortcut=True)
    assert expected.shape == (2, 64, 4, 4)
    for i in (1, 2, 3):
        expected = block(f"group2.{i}", expected, 1, shortcut=False)
    torch.testing.assert_close(group2(x), expected)


def test_the_convolutions_of_wide_residual_networks_start_with_the_variance_of_he_by_fan_out() -> None:
    torch.manual_seed(3)
    for layer in models.create("wrn-28-2").modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 9_000:
            expected = (2 / (layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1])) ** 0.5
            assert layer.weight.std().item() == pytest.approx(
                expected, rel=0.03
            )  # 9,216 draws: 0.7 % deviation


def test_wide_residual_networks_drop_three_tenths_between_the_convolutions_while_training() -> None:
    torch.manual_seed(4)
    network = models.create("wrn-28-2").train()
    seen: list[torch.Tensor] = []
    layer = network.get_submodule("group1.0.conv2")
    layer.register_forward_pre_hook(lambda _layer, args: seen.append(args[0]))
    network.get_submodule("group1.0.bn2").register_parameter("bias", nn.Parameter(torch.full((32,), 9.0)))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        network(images)
        network.eval()(images)
    shares = [(x == 0).float().mean().item() for x in seen]
    assert shares[0] == pytest.approx(0.3, abs=0.01)  # 65,536 draws: 0.0018 deviation
    assert shares[1] < 0.01


def test_an_unknown_name_is_answered_with_the_nearest_one_and_the_way_to_an_own_network() -> None:
    with pytest.raises(
        UnknownNameError, match=r"'lenet-5'.*Did you mean 'lenet5'\?.*timm:NAME.*package\.module:factory"
    ):
        models.create("lenet-5")


def test_the_input_shape_is_known_without_creating_a_network() -> None:
    shapes = {name: models.input_shape(name) for name in ("lenet5", "wrn-16-10", "vit-l-16")}
    assert shapes == {"lenet5": (1, 28, 28), "wrn-16-10": (3, 32, 32), "vit-l-16": (3, 224, 224)}
    with pytest.raises(UnknownNameError, match=r"Did you mean 'resnet50'"):
        models.input_shape("resnet-50")


def test_listing_the_networks_does_not_load_torch() -> None:
    code = (
        "import sys; from sparse_export import models; models.spec('lenet5'); models.input_shape('resnet50');"
        " sys.exit(bool({'torch', 'torchvision', 'timm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_network_of_ours_is_created_without_torchvision() -> None:
    code = (
        "import sys; from sparse_export import models; models.create('wrn-28-2');"
        " sys.exit('torchvision' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
