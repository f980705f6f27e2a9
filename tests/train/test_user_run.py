"""The run of a user's own loop, of networks that are called in many ways."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sparse_export as se
from sparse_export.errors import UsageError
from sparse_export.runtimes.choice import open_runtime
from sparse_export.signature import Feeds

MODULE = '''
import torch
from torch import Tensor, nn


class Reads(nn.Module):
    """Features in a mapping, a mask over pairs of places, a number; loss only where labels are given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, features, *, pairs, scale=1.0, labels=None):
        x = torch.relu(self.first(features["x"]) + features["bias"][:, None, None])
        x = torch.relu(self.second(x))
        mixed = pairs.to(x.dtype) @ x
        scores = self.last(mixed) * scale
        if labels is None:
            return scores
        return (scores - labels).square().mean(), scores


def reads() -> nn.Module:
    return Reads()


def regression() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
'''

BESIDE = """

def example_inputs():
    features = {"x": torch.randn(2, 5, 8), "bias": torch.randn(2)}
    return (features,), {"pairs": torch.ones(5, 5, dtype=torch.bool), "scale": 2.0}


free_sizes = {"features.x": ("batch", "length", None), "features.bias": ("batch",), "pairs": ("length", "length")}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("loop_nets", "loop_nets_beside"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "loop_nets.py").write_text(MODULE)
    (tmp_path / "loop_nets_beside.py").write_text(MODULE + BESIDE)
    return tmp_path


def trained(model: nn.Module, loss: Callable[[], Tensor]) -> se.SparseTraining:
    trainer = se.SparseTraining(
        model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), density=0.5
    )
    for _ in range(3):
        trainer.optimizer.zero_grad()
        loss().backward()
        trainer.step()
    return trainer


def reading(n: int, length: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(n)
    return {
        "features": {
            "x": torch.randn(n, length, 8, generator=generator),
            "bias": torch.randn(n, generator=generator),
        },
        "pairs": torch.rand(length, length, generator=generator) > 0.5,
    }


def as_feeds(call: dict[str, Any]) -> Feeds:
    tensors = {f"features.{name}": one for name, one in call["features"].items()} | {"pairs": call["pairs"]}
    return {name: one.numpy() for name, one in tensors.items()}


@pytest.mark.parametrize("n", [1, 6])
def test_a_call_of_nested_arguments_and_numbers_is_made_again_from_the_folder(n: int, here: Path) -> None:
    from loop_nets import reads  # type: ignore[import-not-found]

    model = reads()
    first = reading(n, 6)
    trainer = trained(model, lambda: model(**first, scale=2.0).square().mean())
    free = {
        "features.x": ("batch", "length", None),
        "features.bias": ("batch",),
        "pairs": ("length", "length"),
    }
    run = trainer.run(here / "run", model="loop_nets:reads", free_sizes=free)
    assert run.info.signature.free == ("batch", "length")
    bundle = se.build(here / "run", here / "bundle")
    other = reading(3, 4)
    with open_runtime(bundle, "onnxruntime-cpu") as session, torch.no_grad():
        found = session.run(as_feeds(other))
        np.testing.assert_allclose(found["output"], model.eval()(**other, scale=2.0).numpy(), atol=1e-5)
    checked = se.validate(bundle)
    assert checked.parity is not None and checked.parity.ok


def test_a_tensor_without_samples_is_kept_whole_beside_a_large_batch(here: Path) -> None:
    from loop_nets import reads

    model = reads()
    large = reading(30_000, 6)
    trainer = trained(model, lambda: model(**large).square().mean())
    (inputs, _, pairs) = trainer.run(here / "run").info.signature.inputs
    assert inputs.shape == (2, 6, 8)  # without free sizes, of inputs whose first axes differ, all are fixed
    assert pairs.shape == (6, 6)


def test_the_network_is_called_as_the_module_of_its_factory_says_and_not_as_in_training(here: Path) -> None:
    from loop_nets_beside import reads  # type: ignore[import-not-found]

    model = reads()
    first, labels = reading(4, 5), torch.zeros(4, 5, 3)
    trainer = trained(model, lambda: model(**first, labels=labels)[0])
    info = trainer.run(here / "beside", model="loop_nets_beside:reads").info
    assert info.signature.input_names == ("features.x", "features.bias", "pairs")
    assert info.signature.output_names == ("output",)
    assert info.call is not None and info.call.kwargs["scale"] == 2.0
    seen = trainer.run(here / "seen", model="loop_nets:reads").info.signature
    assert seen.input_names[-1] == "labels" and len(seen.outputs) == 2
    given = trainer.run(
        here / "given", example_inputs=lambda: ((first["features"],), {"pairs": first["pairs"]})
    )
    assert given.info.signature.input_names == info.signature.input_names
    assert given.info.call is not None and "scale" not in given.info.call.kwargs


def test_a_regression_is_no_classifier_of_one_class(here: Path) -> None:
    from loop_nets import regression

    model = regression()
    x = torch.randn(5, 8)
    run = trained(model, lambda: (model(x) - x.sum(1, keepdim=True)).square().mean()).run(
        here / "run", model="loop_nets:regression"
    )
    assert run.info.task.name == "agreement"
    assert [one.shape for one in run.info.signature.outputs] == [("batch", 1)]


def test_an_argument_that_no_record_can_hold_is_named(here: Path) -> None:
    from loop_nets import reads

    model = reads()
    first = reading(3, 4)
    trainer = trained(model, lambda: model(**first, scale=1.0).square().mean())
    with pytest.raises(UsageError, match="called with inf, which a run cannot record"):
        trainer.run(here / "run", example_inputs=lambda: {**first, "scale": float("inf")})
