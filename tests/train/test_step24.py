from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD

from sparse_export.errors import MissingCapability, UsageError
from sparse_export.models.layers24 import Weight24
from sparse_export.sparsity.pattern import NMPattern, largest_per_group
from sparse_export.sparsity.transposable import transposable_mask
from sparse_export.train import SparseTraining
from sparse_export.train.step24 import Step24

REFERENCE: dict[str, Any] = {"dtype": torch.float32, "backend": "reference"}


class Fixed:
    """Masks that stand where they are put."""

    def __init__(self, masks: dict[str, Tensor]) -> None:
        self.masks = masks
        self.n_updates = 0


def _network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))


def _training(model: nn.Module, **options: Any) -> SparseTraining:
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    return SparseTraining(
        model, optimizer, pattern="2:4", total_steps=40, update_every=7, small_share=0.0, **options
    )


def _losses(model: nn.Module, trainer: SparseTraining, products: Step24 | None, n_steps: int) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(n_steps):
        x = torch.randn((8, 16), generator=generator)
        y = torch.randint(10, (8,), generator=generator)
        trainer.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        trainer.step()
        if products is not None:
            products.after_step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("approach", [(0.0, 0.0), (0.0, 0.5)])
def test_training_goes_the_way_of_the_masked_dense_one_through_mask_updates(
    approach: tuple[float, float],
) -> None:
    dense = _network()
    sparse = copy.deepcopy(dense)
    plain, followed = (_training(one, approach=approach) for one in (dense, sparse))
    products = Step24(sparse, followed, **REFERENCE)
    wanted, found = _losses(dense, plain, None, 30), _losses(sparse, followed, products, 30)
    assert plain.n_updates > 2
    assert found == pytest.approx(wanted, rel=1e-3)
    assert products.sparse_layers == ("0.weight", "2.weight")
    for name, mask in plain.masks.items():
        assert torch.equal(mask, followed.masks[name])


def test_while_a_cap_is_approached_layers_multiply_densely() -> None:
    model = _network()
    trainer = _training(model, approach=(0.2, 0.6))
    products = Step24(model, trainer, **REFERENCE)
    assert len(products.sparse_layers) == 0
    _losses(model, trainer, products, 30)
    assert len(products.sparse_layers) == 2


def test_patterns_are_compressed_when_masks_move_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _network()
    trainer = _training(model)
    products = Step24(model, trainer, **REFERENCE)
    compressed: list[Weight24] = []
    real = Weight24.set_mask

    def counting(layer: Weight24, mask: Tensor | None, *, sparse_backward: bool = False) -> None:
        compressed.append(layer)
        real(layer, mask, sparse_backward=sparse_backward)

    monkeypatch.setattr(Weight24, "set_mask", counting)
    _losses(model, trainer, products, 14)
    assert trainer.n_updates == 2
    assert compressed == [*products.layers.values()] * 2


@pytest.mark.parametrize("sparse_backward", [False, True])
def test_transposable_masks_give_the_same_gradients_by_both_forms(sparse_backward: bool) -> None:
    dense = _network()
    masks = {name: transposable_mask(dense.get_parameter(name).detach()) for name in ("0.weight", "2.weight")}
    with torch.no_grad():
        for name, mask in masks.items():
            dense.get_parameter(name).mul_(mask)
    sparse = copy.deepcopy(dense)
    products = Step24(sparse, Fixed(masks), sparse_backward=sparse_backward, **REFERENCE)
    assert (products.layers["2.weight"].backward_form is not None) == sparse_backward
    x = torch.randn(8, 16)
    for model in (dense, sparse):
        model(x).square().sum().backward()
    for wanted, found in zip(dense.parameters(), sparse.parameters(), strict=True):
        assert wanted.grad is not None
        assert found.grad is not None
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-4, atol=1e-5)


def test_a_sparse_gradient_of_the_input_needs_a_transposable_mask() -> None:
    model = _network()
    weight = model.get_parameter("2.weight").detach()
    weight[:, 0] = 9.0  # so that every group of four outputs keeps all four of this input
    mask = largest_per_group(weight, 1, NMPattern(n=2, m=4))
    with pytest.raises(UsageError, match=r"2\.weight is 2:4 along its inputs only"):
        Step24(model, Fixed({"2.weight": mask}), sparse_backward=True, **REFERENCE)


def test_layers_that_stay_dense_have_a_reason() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 6), nn.Linear(6, 4))
    masks = {
        name: torch.zeros_like(value, dtype=torch.bool)
        for name, value in model.named_parameters()
        if value.ndim == 2
    }
    products = Step24(model, Fixed(masks), sparse_backward=True, **REFERENCE)
    assert set(products.layers) == {"0.weight"}
    assert products.why_dense == {
        "1.weight": "transposed, it has 6 inputs, and 4 does not divide them",
        "2.weight": "it has 6 inputs, and 4 does not divide them",
    }


def test_a_network_without_any_such_layer_is_refused_with_the_reasons() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    masks = {"0.weight": torch.ones(4, 6, dtype=torch.bool)}
    with pytest.raises(UsageError, match=r"0\.weight: it has 6 inputs"):
        Step24(model, Fixed(masks), **REFERENCE)


def test_steps_in_integers_are_refused() -> None:
    with pytest.raises(UsageError, match="int8"):
        Step24(nn.Linear(8, 8), Fixed({}), dtype=torch.int8, backend="reference")


def test_without_a_card_the_hardwares_products_are_refused() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(MissingCapability, match="on cpu"):
        Step24(model, Fixed({"0.weight": torch.zeros(64, 64, dtype=torch.bool)}))


def test_data_parallel_training_averages_the_same_gradients(tmp_path_factory: pytest.TempPathFactory) -> None:
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    try:
        plain = _network()
        weight = plain.get_parameter("2.weight")
        masks = {"2.weight": largest_per_group(weight.detach(), 1, NMPattern(n=2, m=4))}
        with torch.no_grad():
            weight.mul_(masks["2.weight"])
        wrapped_inside = copy.deepcopy(plain)
        Step24(wrapped_inside, Fixed(masks), **REFERENCE)
        wrapped = nn.parallel.DistributedDataParallel(wrapped_inside)
        x = torch.randn(8, 16)
        for model in (plain, wrapped):
            model(x).square().sum().backward()
        for wanted, found in zip(plain.parameters(), wrapped_inside.parameters(), strict=True):
            assert wanted.grad is not None
            assert found.grad is not None
            torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-4, atol=1e-5)
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
def test_on_a_card_a_step_between_mask_updates_makes_the_host_wait_for_nothing() -> None:
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)).cuda()
    masks = {name: transposable_mask(model.get_parameter(name).detach()) for name in ("0.weight", "2.weight")}
    products = Step24(model, Fixed(masks), sparse_backward=True)
    x = torch.randn(256, 128, device="cuda")
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            model(x).square().sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        products.after_step()
        with torch.autocast("cuda", torch.bfloat16):
            model(x).square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
