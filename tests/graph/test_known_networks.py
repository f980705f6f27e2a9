"""Networks of torchvision and transformers are exported with all that they return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_export.errors import UsageError
from sparse_export.graph.example import example_of_shape, make_example
from sparse_export.graph.export import onnx_from_module
from tests.graph.test_any_network import ends, exported, initializers
from tests.making_runs import stir_batch_norm

pytestmark = pytest.mark.slow

segmentation = pytest.importorskip("torchvision.models.segmentation")
detection = pytest.importorskip("torchvision.models.detection")
_BARE: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 3}


def lraspp() -> nn.Module:
    network: nn.Module = segmentation.lraspp_mobilenet_v3_large(**_BARE)
    return network


def deeplab() -> nn.Module:
    network: nn.Module = segmentation.deeplabv3_resnet50(**_BARE, aux_loss=True)
    return network


class RawHead(nn.Module):
    """What a detector answers before it chooses among boxes."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone: Any = detector.backbone
        self.head: Any = detector.head

    def forward(self, images: Tensor) -> Any:
        return self.head(list(self.backbone(images).values()))


def ssdlite_head() -> nn.Module:
    return RawHead(detection.ssdlite320_mobilenet_v3_large(**_BARE))


def fcos_head() -> nn.Module:
    return RawHead(detection.fcos_resnet50_fpn(**_BARE))


@pytest.mark.parametrize(
    ("make", "outputs"),
    [
        (lraspp, {"out": ["batch", 3, 64, 64]}),
        (deeplab, {"out": ["batch", 3, 64, 64], "aux": ["batch", 3, 64, 64]}),
        pytest.param(
            ssdlite_head,
            {"bbox_regression": ["batch", 144, 4], "cls_logits": ["batch", 144, 3]},
            marks=pytest.mark.full,
        ),
        pytest.param(
            fcos_head,
            {
                "cls_logits": ["batch", 86, 3],
                "bbox_regression": ["batch", 86, 4],
                "bbox_ctrness": ["batch", 86, 1],
            },
            marks=pytest.mark.full,
        ),
    ],
)
def test_networks_with_several_outputs_for_pictures(
    make: Callable[[], nn.Module], outputs: dict[str, list[str | int]]
) -> None:
    torch.manual_seed(0)
    network = make().eval()
    stir_batch_norm(network)
    model = exported(network, example_of_shape((3, 64, 64)))
    assert ends(model) == {"input": ["batch", 3, 64, 64]} | outputs
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    layers = {name for name, one in network.named_parameters() if one.dim() > 1}
    assert layers <= set(initializers(model))


@pytest.mark.parametrize(
    "name",
    [
        "ssdlite320_mobilenet_v3_large",
        pytest.param("fcos_resnet50_fpn", marks=pytest.mark.full),
    ],
)
def test_a_detector_that_chooses_among_its_boxes_is_refused_in_plain_words(name: str) -> None:
    detector = getattr(detection, name)(**_BARE).eval()
    example = make_example(detector, ([torch.rand(3, 320, 320)],))
    with pytest.raises(UsageError, match=r"its forward branches on values.* returns its raw outputs"):
        onnx_from_module(detector, example, masks={})


FREE = {"input_ids": ("batch", "sequence"), "attention_mask": ("batch", "sequence")}
SMALL = {"vocab_size": 99, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
LENGTHS = tuple({"batch": n, "sequence": length} for n, length in ((1, 1), (2, 7), (3, 13), (8, 32)))


@pytest.mark.parametrize(
    ("config", "network", "settings", "outputs"),
    [
        ("BertConfig", "BertModel", {}, ["last_hidden_state", "pooler_output"]),
        ("LlamaConfig", "LlamaForCausalLM", {"use_cache": False}, ["logits"]),
    ],
)
def test_language_models_of_transformers(
    config: str, network: str, settings: dict[str, Any], outputs: list[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    made = getattr(transformers, config)(**SMALL, intermediate_size=32, max_position_embeddings=32)
    module = getattr(transformers, network)(made).eval()
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[1, 3:] = 0
    inputs = {"input_ids": torch.randint(0, 99, (2, 5)), "attention_mask": mask, **settings}
    model = exported(module, make_example(module, (), inputs, free_sizes=FREE), LENGTHS)
    assert [value.name for value in model.graph.output] == outputs
    assert {name for name, one in module.named_parameters() if one.dim() > 1} <= set(initializers(model))
