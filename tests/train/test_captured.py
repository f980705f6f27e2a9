"""Steps replayed as one graph: by CUDA where there is a card, else by recordings that behave like it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD

import sparse_export as se
from sparse_export.errors import Interrupted, RecipeError, UsageError
from sparse_export.train import captured, session
from sparse_export.train.captured import N_LAUNCHED, CapturedStep, make_capturable, set_rate
from sparse_export.train.loop import train
from sparse_export.train.observer import SilentObserver
from sparse_export.train.recipe import load_recipe
from tests.recording import recorded
from tests.train.test_loop import outcome, small

# Where its drops change the learning rate, a graph that kept the first one would go another way.
MOVING = {
    "epochs": 1,
    "augment": "crop-flip",
    "cuda_graph": True,
    "learning_rate": {"schedule": "cosine", "warmup": 0.1},
    "sparsity": {"update_every": 7},
}


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Recordings in place of CUDA graphs; counts them."""
    n_captures: list[int] = []

    def counted(call: Any) -> Any:
        n_captures.append(1)
        return recorded(call)

    monkeypatch.setattr(captured, "cuda_capture", counted)
    monkeypatch.setattr(session, "require_possible", lambda *_: None)
    return n_captures


def both(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_captures: list[int]
) -> tuple[Any, Any]:
    """The outcomes of a replayed training, and of one whose steps are all launched."""
    train(small(**changes), tmp_path / "replayed", device="cpu")
    assert n_captures == [1]
    with monkeypatch.context() as patch:
        patch.setattr(captured, "N_LAUNCHED", 10**9)
        train(small(**changes), tmp_path / "launched", device="cpu")
    assert n_captures == [1]
    return outcome(tmp_path / "replayed"), outcome(tmp_path / "launched")


class WithDropout(nn.Module):
    """Draws random numbers in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 40), nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = nn.functional.dropout(self.a(x.flatten(1)).relu(), 0.3, self.training)
        logits: Tensor = self.b(hidden)
        return logits


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 2, "sparsity": {"update_every": 0}},
        {"dense": True},
        {"sparsity": {"method": "rigl", "update_every": 7}},
        {"sparsity": {"method": "magnitude", "update_every": 7}},
        {"sparsity": {"method": "asp", "pattern": "2:4", "density": None}},
        {"optimizer": {"name": "adamw", "lr": 0.003}, "ema": 0.9},
        {"precision": "bf16", "channels_last": True},
        {"label_smoothing": 0.1, "model": "tests.train.test_captured:WithDropout"},
    ],
    ids=["each epoch", "dense", "rigl", "magnitude", "asp", "adamw and ema", "bf16", "dropout"],
)
def test_a_replayed_training_ends_with_the_bits_of_a_launched_one(
    changes: dict[str, Any], on_cpu: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed, launched = both({**MOVING, **changes}, tmp_path, monkeypatch, on_cpu)
    assert replayed == launched


def test_it_is_the_training_that_a_plain_recipe_gives(on_cpu: list[int], tmp_path: Path) -> None:
    train(small(**MOVING), tmp_path / "replayed", device="cpu")
    train(small(**{**MOVING, "cuda_graph": False}), tmp_path / "plain", device="cpu")
    replayed, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("replayed", "plain"))
    for name, value in plain.items():  # a float32 learning rate rounds otherwise
        torch.testing.assert_close(replayed[name], value, rtol=1e-3, atol=1e-4)


def test_a_broken_off_replayed_training_goes_on_to_the_same_end(on_cpu: list[int], tmp_path: Path) -> None:
    class StopAt(SilentObserver):
        def stepped(self, step: int, loss: Tensor) -> None:
            if step == 13:
                os.kill(os.getpid(), signal.SIGTERM)

    train(small(**MOVING), tmp_path / "whole", device="cpu")
    with pytest.raises(Interrupted, match="step 13"):
        train(small(**MOVING), tmp_path / "broken", device="cpu", observer=StopAt())
    train(None, tmp_path / "broken", device="cpu", resume=True)
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


def test_the_first_steps_are_launched_and_the_inputs_of_all_of_them_count(on_cpu: list[int]) -> None:
    total = torch.zeros(())

    def work(x: Tensor, y: Tensor) -> Tensor:
        total.add_((x * y).sum())
        return total * 2

    step = CapturedStep(work)
    losses = []
    for number in range(1, N_LAUNCHED + 4):
        assert step.is_captured == (number > N_LAUNCHED + 1)
        losses.append(step(torch.full((2,), float(number)), torch.ones(2)))
    assert [float(loss) for loss in losses] == [4, 12, 24, 40, 60, 84]
    assert on_cpu == [1]


def test_other_shapes_and_what_reads_from_the_device_are_refused(on_cpu: list[int]) -> None:
    step = CapturedStep(lambda x, y: (x + y).sum())
    for _ in range(N_LAUNCHED + 1):
        step(torch.ones(3), torch.ones(3))
    with pytest.raises(UsageError, match=r"shape \(1,\)"):
        step(torch.ones(1), torch.ones(3))
    reading = CapturedStep(lambda x, y: x.sum() * y.sum().item())
    for _ in range(N_LAUNCHED):
        reading(torch.ones(3), torch.ones(3))
    with pytest.raises(
        UsageError, match="cannot be captured as a CUDA graph: operation not permitted"
    ) as caught:
        reading(torch.ones(3), torch.ones(3))
    assert "and more" not in str(caught.value)
    assert "cuda_graph" in str(caught.value.do)


def test_the_first_error_of_a_failed_capture_is_the_reason() -> None:
    def fails(call: Any) -> Any:
        try:
            raise ValueError("a value was read back\nand more")
        except ValueError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904 - as torch does

    step = CapturedStep(lambda x, y: x.sum(), fails)
    for _ in range(N_LAUNCHED):
        step(torch.ones(1), torch.ones(1))
    with pytest.raises(UsageError, match="as a CUDA graph: a value was read back"):
        step(torch.ones(1), torch.ones(1))

    def too_large(call: Any) -> Any:
        raise torch.OutOfMemoryError("too large")

    step = CapturedStep(lambda x, y: x.sum(), too_large)
    for _ in range(N_LAUNCHED):
        step(torch.ones(1), torch.ones(1))
    with pytest.raises(torch.OutOfMemoryError):
        step(torch.ones(1), torch.ones(1))


@pytest.mark.gpu
def test_on_a_card_a_failed_capture_says_why_and_leaves_the_stream_as_it_was() -> None:
    stream = torch.cuda.current_stream()
    step = CapturedStep(lambda x, y: x.sum() * y.sum().item())
    ones = torch.ones(3, device="cuda")
    for _ in range(N_LAUNCHED):
        step(ones, ones)
    with pytest.raises(UsageError, match="cannot be captured as a CUDA graph") as caught:
        step(ones, ones)
    assert "previous error" not in str(caught.value)
    assert torch.cuda.current_stream() == stream


def test_learning_rates_go_to_the_device_and_back() -> None:
    optimizer = SGD([nn.Parameter(torch.ones(2))], lr=0.5)
    make_capturable(optimizer, torch.device("cpu"))
    (group,) = optimizer.param_groups
    kept = group["lr"]
    set_rate(optimizer, 0.25)
    assert group["lr"] is kept
    assert float(kept) == 0.25
    make_capturable(optimizer, None)
    assert group["lr"] == 0.25
    assert isinstance(group["lr"], float)
    set_rate(optimizer, 0.125)
    assert group["lr"] == 0.125


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (
            {"precision": "bf16", "sparsity": {"pattern": "2:4", "density": None, "products": "2:4"}},
            "products '2:4'",
        ),
        ({"sparsity": {"products": "csr"}}, "products 'csr'"),
        ({"sparsity": {"pattern": "2:4", "density": None, "method": "sr-ste"}}, "method 'sr-ste'"),
    ],
)
def test_a_recipe_is_refused_whose_steps_change_by_more_than_tensors(
    changes: dict[str, Any], what: str
) -> None:
    with pytest.raises(RecipeError, match=f"cuda_graph and {what} exclude each other"):
        load_recipe("digits", changes={"cuda_graph": True, **changes})


def test_without_a_card_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cuda_graph is set, on cpu"):
        train(small(cuda_graph=True), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"precision": "bf16", "channels_last": True, "ema": 0.9}])
def test_on_a_card_replayed_steps_train_as_launched_ones_do(changes: dict[str, Any], tmp_path: Path) -> None:
    runs: list[se.Run] = []
    for replay in (True, False):
        recipe = small(**{**MOVING, **changes, "cuda_graph": replay})
        runs.append(train(recipe, tmp_path / str(replay), device="cuda"))
    replayed, launched = (run.info.test for run in runs)
    assert replayed is not None
    assert launched is not None
    assert abs(replayed.figure - launched.figure) < 3.0
    assert runs[0].info.n_active == runs[1].info.n_active
    masks = [load_file(run.path / "masks.safetensors") for run in runs]
    alike = sum(int((masks[0][name] == masks[1][name]).sum()) for name in masks[0])
    assert alike >= 0.98 * runs[0].info.n_masked
