"""Networks of torchvision, and a small one for regression, made in torch; those of transformers are beside it.

Their weights are random, so what pruning costs them says nothing of trained ones; batch norms have the
statistics of drawn pictures, so that signals go through as they do in a trained network.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.public_networks import Arrays, PublicNetwork, pictures
from benchmarks.torch_words import LENGTH, VOCABULARY

__all__ = ["TORCH_NETWORKS"]

_BARE: dict[str, Any] = {"weights": None, "weights_backbone": None}
_N_VALUES = 16  # of a sample of the regression
_STEPS = 600  # of its training; about 2 s


class RawHead(nn.Module):
    """What a detector answers before it chooses among boxes."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone: Any = detector.backbone
        self.head: Any = detector.head

    def forward(self, images: Tensor) -> Any:
        return self.head(list(self.backbone(images).values()))


def lraspp() -> nn.Module:
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    return _settled(lambda: lraspp_mobilenet_v3_large(**_BARE, num_classes=21), 128)


def deeplab() -> nn.Module:
    from torchvision.models.segmentation import deeplabv3_resnet50

    return _settled(lambda: deeplabv3_resnet50(**_BARE, num_classes=21, aux_loss=True), 128)


def ssdlite_heads() -> nn.Module:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    return _settled(lambda: RawHead(ssdlite320_mobilenet_v3_large(**_BARE, num_classes=91)), 192)


def fcos_heads() -> nn.Module:
    from torchvision.models.detection import fcos_resnet50_fpn

    return _settled(lambda: RawHead(fcos_resnet50_fpn(**_BARE, num_classes=91)), 128)


def ssdlite_whole() -> nn.Module:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    torch.manual_seed(0)
    network: nn.Module = ssdlite320_mobilenet_v3_large(**_BARE, num_classes=91).eval()
    return network


def regression() -> nn.Module:
    """An MLP that was trained to a sum of waves of its values."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(_N_VALUES, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1)
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(_STEPS):
        x = torch.randn(256, _N_VALUES)
        wanted = torch.sin(x).sum(1, keepdim=True) + x[:, :1] * x[:, 1:2]
        optimizer.zero_grad()
        nn.functional.mse_loss(network(x), wanted).backward()
        optimizer.step()
    return network.eval()


def _settled(make: Any, size: int) -> nn.Module:
    """A network whose batch norms have the statistics of eight pictures."""
    torch.manual_seed(0)
    network: nn.Module = make().train()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None  # an average over all batches
        elif isinstance(part, nn.Dropout):
            part.eval()
    with torch.no_grad():
        for seed in range(2):
            network(torch.from_numpy(pictures(np.random.default_rng(seed), 4, size, 0.5, 0.25)))
    return network.eval()


def _pictures_of(size: int) -> Any:
    def inputs(rng: np.random.Generator, n: int) -> Arrays:
        return {"input": pictures(rng, n, size, 0.5, 0.25)}

    return inputs


def _values(rng: np.random.Generator, n: int) -> Arrays:
    return {"input": rng.normal(size=(n, _N_VALUES)).astype(np.float32)}


def _words(rng: np.random.Generator, n: int) -> Arrays:
    ids = np.minimum(rng.zipf(1.3, (n, LENGTH)), VOCABULARY - 1).astype(np.int64)
    used = rng.integers(LENGTH // 3, LENGTH + 1, n)
    return {"input_ids": ids, "attention_mask": (np.arange(LENGTH) < used[:, None]).astype(np.int64)}


_VISION, _WORDS = "torchvision", "transformers==5.24.0"
_LENGTHS = f"batch=1:4:8,sequence=4:{LENGTH}:64"

_ALL = (
    PublicNetwork(
        name="regression",
        what="MLP that was trained to a function of 16 values",
        requirement="torch",
        factory="benchmarks.torch_networks:regression",
        inputs=_values,
        input_shape=(_N_VALUES,),
        n_calibration=256,
        n_held_out=256,
    ),
    PublicNetwork(
        name="bert",
        what="encoder of transformers, random weights, free length",
        requirement=_WORDS,
        factory="benchmarks.torch_words:bert",
        inputs=_words,
        profiles=(_LENGTHS,),
        n_calibration=40,
        n_held_out=32,
    ),
    PublicNetwork(
        name="gpt2",
        what="causal decoder of transformers, random weights, free length",
        requirement=_WORDS,
        factory="benchmarks.torch_words:gpt2",
        inputs=_words,
        profiles=(_LENGTHS,),
        n_calibration=40,
        n_held_out=32,
    ),
    *(
        PublicNetwork(
            name=name,
            what=what,
            requirement=_VISION,
            factory=f"benchmarks.torch_networks:{function}",
            inputs=_pictures_of(size),
            input_shape=(3, size, size),
            n_calibration=10,
            n_held_out=8,
        )
        for name, function, size, what in (
            ("lraspp", "lraspp", 128, "lraspp_mobilenet_v3_large, random weights"),
            (
                "ssdlite-heads",
                "ssdlite_heads",
                192,
                "ssdlite320_mobilenet_v3_large before NMS, random weights",
            ),
            ("ssdlite-whole", "ssdlite_whole", 320, "ssdlite320_mobilenet_v3_large with NMS, random weights"),
            ("deeplab", "deeplab", 128, "deeplabv3_resnet50, two outputs, random weights"),
            ("fcos-heads", "fcos_heads", 128, "fcos_resnet50_fpn before NMS, random weights"),
        )
    ),
)

TORCH_NETWORKS: dict[str, PublicNetwork] = {network.name: network for network in _ALL}
"""By name."""
