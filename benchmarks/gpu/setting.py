"""The sizes that a session measures."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparse_export.sparsity.product24 import Backend


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured on which device.

    Attributes:
        device: of torch.
        backends: of the 2:4 products.
        dtypes: of the products.
        products: (outputs, inputs) of each Linear layer.
        rows: numbers of rows of its input.
        square: rows, columns of the matrices for the matrix rate.
        bandwidth_mib: size of one copy.
        networks: (name, input shape, type, batch sizes) each.
        training: (name, input shape, batch size, compiled, as one CUDA graph) each.
        recipes: (recipe, batch size) each.
        trained: (recipe, epochs) each.
        rounds: of one measurement.
        block_s: seconds of one block of calls.
        warmup_limit_s: seconds of the longest warm-up.
    """

    device: str
    backends: tuple[Backend, ...]
    dtypes: tuple[torch.dtype, ...]
    products: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    square: int
    bandwidth_mib: int
    networks: tuple[tuple[str, tuple[int, ...], torch.dtype, tuple[int, ...]], ...]
    training: tuple[tuple[str, tuple[int, ...], int, bool, bool], ...]
    recipes: tuple[tuple[str, int], ...]
    trained: tuple[tuple[str, int], ...]
    rounds: int
    block_s: float
    warmup_limit_s: float


_PICTURE = (3, 224, 224)
CARD = Setting(
    device="cuda",
    backends=("cusparselt",),
    dtypes=(torch.bfloat16,),
    products=(
        (768, 768),
        (3072, 768),
        (4096, 1024),
        (1024, 4096),
        (4096, 4096),
        (14336, 4096),
        (3072, 10240),
    ),
    rows=(1, 32, 1024, 6304, 16384),
    square=8192,
    bandwidth_mib=2048,
    networks=(
        ("vit-l-16", _PICTURE, torch.bfloat16, (256, 32, 1)),
        ("vit-l-16", _PICTURE, torch.float16, (256,)),
        ("vit-b-16", _PICTURE, torch.bfloat16, (256, 32, 1)),
        ("resnet50", _PICTURE, torch.bfloat16, (256, 32, 1)),
    ),
    training=(
        ("vit-l-16", _PICTURE, 64, True, True),
        ("vit-l-16", _PICTURE, 64, True, False),
        ("vit-b-16", _PICTURE, 128, True, True),
    ),
    recipes=(("imagenet-resnet50-10", 128), ("cifar10-wrn-28-2", 128)),
    trained=(("cifar10-vgg-like", 5), ("cifar10-wrn-28-2", 5)),
    rounds=20,
    block_s=0.01,
    warmup_limit_s=0.6,
)
REHEARSAL = Setting(
    device="cpu",
    backends=("reference",),
    dtypes=(torch.float32,),
    products=((32, 64),),
    rows=(1, 8),
    square=64,
    bandwidth_mib=1,
    networks=(("lenet300-100", (1, 28, 28), torch.float32, (2,)),),
    training=(("lenet300-100", (1, 28, 28), 2, False, False),),
    recipes=(("digits", 4),),
    trained=(("digits", 2),),
    rounds=20,
    block_s=0.0005,
    warmup_limit_s=0.02,
)
