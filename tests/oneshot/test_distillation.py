"""Fine-tuning towards the dense network's outputs, without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sparse_export as se
from sparse_export.errors import ArtefactError, Interrupted, UsageError
from sparse_export.models.run_network import network_of_run
from sparse_export.oneshot import Sparsified, sparsify
from sparse_export.sparsity.pattern import NMPattern, obeys
from sparse_export.tasks.shipped import task_named
from sparse_export.train.loop import train
from sparse_export.train.recipe import load_recipe
from sparse_export.train.teacher import Teacher, read_teacher, save_teacher

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets of the same inputs with right and with wrong labels."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(4, 1, 8, 8))
    for name, shift in (("right", 0), ("wrong", 1)):
        arrays: dict[str, Any] = {}
        draw = np.random.default_rng(1)
        for part, n in (("train", 600), ("test", 200)):
            labels = draw.integers(0, 4, n)
            inputs = centres[labels] + draw.normal(size=(n, 1, 8, 8))
            arrays |= {f"x_{part}": inputs.astype(np.float32), f"y_{part}": (labels + shift) % 4}
        np.savez(folder / f"{name}.npz", **arrays)
    return folder


@pytest.fixture(scope="module")
def dense(folder: Path) -> se.Run:
    changes = {"dense": True, "epochs": 3, "data": f"npz:{folder / 'right.npz'}"}
    return train(load_recipe("digits", changes=changes), folder / "dense", device="cpu")


def tuned(dense: se.Run, out: Path, data: Path, **options: Any) -> Sparsified:
    return sparsify(dense.path, out, data=f"npz:{data}", finetune=2, device="cpu", **options)


def test_labels_are_not_looked_at_and_the_dense_network_is_learnt(
    dense: se.Run, folder: Path, tmp_path: Path
) -> None:
    runs = {
        name: tuned(dense, tmp_path / name, folder / f"{name}.npz", distill="outputs")
        for name in ("right", "wrong")
    }
    files = [(tmp_path / name / WEIGHTS).read_bytes() for name in ("right", "wrong")]
    assert files[0] == files[1]
    by_labels = tuned(dense, tmp_path / "labels", folder / "right.npz")
    assert (by_labels.run.path / WEIGHTS).read_bytes() != files[0]
    run = runs["right"].run
    assert run.info.recipe["distill"] == "outputs"
    weights, masks = load_file(run.path / WEIGHTS), load_file(run.path / "masks.safetensors")
    for name, mask in masks.items():
        assert not weights[name][~mask].any()
    sparse = [layer.name for layer in runs["right"].report.layers if layer.pattern]
    assert sparse
    assert all(obeys(masks[name], 1, NMPattern(n=2, m=4)) for name in sparse)
    stages = runs["right"].report.stages
    assert stages[-1].test is not None
    assert stages[0].test is not None
    assert stages[-1].test.figure > stages[0].test.figure - 0.03


def test_distance_from_the_dense_outputs_falls(dense: se.Run, folder: Path, tmp_path: Path) -> None:
    with np.load(folder / "right.npz") as stored:
        inputs = stored["x_test"]

    def logits(run: Path) -> torch.Tensor:
        model = network_of_run(se.open_run(run)).eval()
        mean, std = (float(one) for one in (inputs.mean(), inputs.std()))
        with torch.no_grad():
            found: torch.Tensor = model(torch.from_numpy((inputs - mean) / std))
        return found.log_softmax(1)

    sparsify(dense.path, tmp_path / "once", data=f"npz:{folder / 'right.npz'}", device="cpu")
    tuned(dense, tmp_path / "tuned", folder / "wrong.npz", distill="outputs")
    wanted = logits(dense.path)
    distances = [
        float(
            torch.nn.functional.kl_div(logits(tmp_path / run), wanted, reduction="batchmean", log_target=True)
        )
        for run in ("once", "tuned")
    ]
    assert distances[1] < 0.5 * distances[0]


class _Stopping:
    """Interrupts training after some steps."""

    def __init__(self, after: int) -> None:
        self._after = after

    def started(self, *_: Any) -> None: ...

    def stepped(self, step: int, _loss: Any) -> None:
        if step == self._after:
            raise KeyboardInterrupt

    def finished_epoch(self, *_: Any) -> None: ...


def test_stopped_distillation_goes_on_to_the_same_bits(dense: se.Run, folder: Path, tmp_path: Path) -> None:
    data = folder / "right.npz"
    whole = tuned(dense, tmp_path / "whole", data, distill="outputs")
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        tuned(dense, tmp_path / "run", data, distill="outputs", observer=_Stopping(7))
    again = train(None, tmp_path / "run", resume=True, device="cpu")
    assert (again.path / WEIGHTS).read_bytes() == (whole.run.path / WEIGHTS).read_bytes()


def test_a_run_without_its_teacher_is_not_gone_on_with_by_labels(
    dense: se.Run, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        tuned(dense, tmp_path / "run", folder / "right.npz", distill="outputs", observer=_Stopping(2))
    (tmp_path / "run" / "resume" / "teacher.safetensors").unlink()
    with pytest.raises(ArtefactError, match="dense network that is learnt from"):
        train(None, tmp_path / "run", resume=True, device="cpu")


def test_a_recipe_alone_has_no_network_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no dense network to learn from"):
        train(load_recipe("digits", changes={"distill": "outputs"}), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(
    ("options", "what"),
    [({"distill": "outputs"}, "without --finetune"), ({"distill": "logits", "finetune": 1}, "'logits'")],
)
def test_distillation_that_cannot_be_is_refused(options: dict[str, Any], what: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=what):
        sparsify("digits-cnn", tmp_path / "run", weights="random", data="digits", **options)


def test_outputs_that_are_no_classes_are_held_by_their_variance(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torch.nn.Linear(4, 3)
    save_teacher(tmp_path, network.state_dict())
    teacher = Teacher(read_teacher(torch.nn.Linear(4, 3), tmp_path), task_named("regression"))
    x = torch.randn(50, 4)
    wanted = network(x).detach()

    def loss(outputs: torch.Tensor) -> torch.Tensor:
        return teacher.loss(x, lambda _: outputs, network)

    assert float(loss(wanted)) == 0.0
    assert float(loss(torch.full_like(wanted, float(wanted.mean())))) == pytest.approx(1, rel=0.02)
    with pytest.raises(UsageError, match="no output of floats"):
        loss(wanted.long())


class _Twice(torch.nn.Module):
    """Calls one layer twice, and another once."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.last = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(self.shared(torch.tanh(self.shared(x))))
        return found


def test_layers_are_learnt_by_what_each_of_their_calls_gives(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense, other = _Twice(), _Twice()
    save_teacher(tmp_path, dense.state_dict())
    layers = ("shared", "last")
    teacher = Teacher(read_teacher(_Twice(), tmp_path), task_named("regression"), layers)
    x = torch.randn(50, 4)

    def calls(network: _Twice) -> list[torch.Tensor]:
        first = network.shared(x)
        second = network.shared(torch.tanh(first))
        return [first, second, network.last(second)]

    with torch.no_grad():
        by_hand = [
            float((one - wanted).square().mean() / wanted.var())
            for one, wanted in zip(calls(other), calls(dense), strict=True)
        ]
        assert float(teacher.loss(x, dense, dense)) == pytest.approx(0, abs=1e-12)
    found = teacher.loss(x, other, other)
    assert float(found.detach()) == pytest.approx(by_hand[-1] + 10 * float(np.mean(by_hand)), rel=1e-5)
    found.backward()
    assert all(one.grad is not None and one.grad.any() for one in other.parameters())
    assert not any(module._forward_hooks for module in other.modules())


def test_features_come_nearer_to_the_dense_layers_than_outputs_alone(
    dense: se.Run, folder: Path, tmp_path: Path
) -> None:
    data = folder / "right.npz"
    with np.load(data) as stored:
        inputs = torch.from_numpy(stored["x_test"])
    inputs = (inputs - inputs.mean()) / inputs.std()

    def within(run: se.Run) -> list[torch.Tensor]:
        network, found = network_of_run(run).eval(), []
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                module.register_forward_hook(lambda _m, _i, output: found.append(output.detach()))
        with torch.no_grad():
            network(inputs)
        return found

    wanted, distances = within(dense), {}
    for distill in ("outputs", "features"):
        run = tuned(dense, tmp_path / distill, data, distill=distill, permute=True).run
        assert run.info.recipe["distill"] == distill
        distances[distill] = [
            float((one.sort(1)[0] - other.sort(1)[0]).square().mean() / other.var())
            for one, other in zip(within(run), wanted, strict=True)
        ]
    assert np.mean(distances["features"]) < np.mean(distances["outputs"])


def test_stopped_learning_of_features_goes_on_to_the_same_bits(
    dense: se.Run, folder: Path, tmp_path: Path
) -> None:
    data = folder / "right.npz"
    whole = tuned(dense, tmp_path / "whole", data, distill="features")
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        tuned(dense, tmp_path / "run", data, distill="features", observer=_Stopping(7))
    again = train(None, tmp_path / "run", resume=True, device="cpu")
    assert (again.path / WEIGHTS).read_bytes() == (whole.run.path / WEIGHTS).read_bytes()
