from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparse_export import models
from sparse_export.errors import MissingCapability, UsageError
from sparse_export.models import layers24
from sparse_export.runtimes.torch24 import Torch24Session, rewrite
from sparse_export.signature import class_signature
from sparse_export.sparsity.pattern import NMPattern, largest_per_group


def _pruned(model: nn.Module) -> nn.Module:
    """Cut to 2:4 along the inputs wherever four divides them."""
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1 and value.shape[1] % 4 == 0:
                flat = value.flatten(1)
                value.copy_((flat * largest_per_group(flat, 1, NMPattern(n=2, m=4))).view(value.shape))
    return model.eval()


def _small() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 36, 10)
    )


def test_a_rewritten_network_computes_what_it_did_before() -> None:
    model = _pruned(_small())
    x = torch.randn(4, 3, 8, 8)
    wanted = model(x)
    found = rewrite(copy.deepcopy(model), dtype=torch.float32, backend="reference")
    torch.testing.assert_close(found.model(x), wanted, rtol=1e-4, atol=1e-5)
    assert set(found.layers) == {"2.weight", "5.weight"}
    assert not any(value.requires_grad for value in found.model.parameters())


def test_whatever_stays_dense_has_its_reason() -> None:
    model = _pruned(_small())
    with torch.no_grad():
        model.get_parameter("5.weight")[0, :4] = 1.0
    found = rewrite(model, dtype=torch.float32, backend="reference")
    assert set(found.layers) == {"2.weight"}
    assert "3x3 convolution" in found.why_dense["0.weight"]
    assert found.why_dense["5.weight"] == "1 of its 1,080 groups of four have more than 2 nonzeros"


def test_a_plan_decides_which_layers_are_sparse() -> None:
    found = rewrite(_pruned(_small()), dtype=torch.float32, backend="reference", only=["5.weight"])
    assert set(found.layers) == {"5.weight"}
    assert found.why_dense["2.weight"] == "the plan leaves it dense"
    with pytest.raises(UsageError, match=r"'6\.weight'"):
        rewrite(_small(), dtype=torch.float32, backend="reference", only=["6.weight"])


def test_a_vision_transformer_is_sparse_in_all_its_projections() -> None:
    model = _pruned(models.create("timm:test_vit"))
    x = torch.randn(2, 3, *models.input_shape("timm:test_vit")[1:])  # type: ignore[index]
    with torch.no_grad():
        wanted = model(x)
        found = rewrite(copy.deepcopy(model), dtype=torch.float32, backend="reference")
        torch.testing.assert_close(found.model(x), wanted, rtol=1e-3, atol=1e-4)
    assert {"blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"} <= set(found.layers)


def test_products_in_int8_are_as_near_as_their_steps_allow() -> None:
    model = _pruned(_small())
    x = torch.randn(16, 3, 8, 8)
    wanted = model(x)
    found = rewrite(copy.deepcopy(model), dtype=torch.float32, backend="reference", product_dtype=torch.int8)
    assert set(found.layers) == {"2.weight", "5.weight"}
    error = float((found.model(x) - wanted).detach().norm() / wanted.detach().norm())
    assert 1e-5 < error < 0.03


def test_rows_of_each_layer_are_counted_for_the_choice_of_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rewrite(_pruned(_small()), dtype=torch.float32, backend="reference")
    asked: list[tuple[tuple[int, int], int]] = []

    def best(products: list[tuple[tuple[int, int], int]], *_: object) -> list[int]:
        asked.extend(products)
        return [n_rows % 100 for _, n_rows in products]

    monkeypatch.setattr(layers24, "best_algorithms", best)
    found.tune(torch.randn(4, 3, 8, 8))
    assert [n_rows for _, n_rows in asked] == [4 * 36, 4]
    assert [layer.algorithm for layer in found.layers.values()] == [44, 4]
    assert [shape for shape, _ in asked] == [
        layer.forward_form.shape for layer in found.layers.values() if layer.forward_form is not None
    ]


def test_the_session_speaks_as_every_runtime_does() -> None:
    model = _pruned(_small())
    x = torch.randn(4, 3, 8, 8)
    wanted: Tensor = model(x).detach()
    found24 = rewrite(model, dtype=torch.float32, backend="reference")
    with Torch24Session(found24, class_signature((3, 8, 8), wanted.shape[1])) as session:
        assert session.name == "torch24-cpu"
        found = session.run(x.numpy())
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-5)
        with pytest.raises(UsageError, match="float64"):
            session.run(x.double().numpy())
    with pytest.raises(UsageError, match="closed"):
        session.run(x.numpy())


def test_without_a_card_the_hardwares_products_are_refused() -> None:
    with pytest.raises(MissingCapability, match="on cpu"):
        rewrite(_pruned(_small()), dtype=torch.float16, backend="cusparselt")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_card_a_vision_transformer_agrees_with_float64(dtype: torch.dtype) -> None:
    model = _pruned(models.create("vit-b-16")).cuda()
    nn.init.normal_(model.get_parameter("heads.head.weight"), std=0.02)
    x = torch.randn(8, 3, 224, 224, device="cuda")
    with torch.no_grad():
        wanted = copy.deepcopy(model).double()(x.double())
        found = rewrite(model, dtype=dtype, backend="cusparselt")
        assert len(found.layers) == 4 * 12
        y = found.model(x.to(dtype)).double()
    assert float((y - wanted).norm() / wanted.norm()) < 10 * torch.finfo(dtype).eps
