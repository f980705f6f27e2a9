"""Fitting the kept weights of a pruned torch network together, without labels."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor, nn

from sparse_export.cli.sparsify import command
from sparse_export.errors import UsageError
from sparse_export.oneshot import Sparsified, joint, pipeline, recovering, sparsify
from sparse_export.oneshot.joint import JointFit, fit_jointly
from sparse_export.oneshot.recovery import Recovery, recovery_from_text
from sparse_export.sparsity.pattern import NMPattern, largest_per_group, obeys
from sparse_export.tasks.shipped import task_named

TWO_FOUR = NMPattern(n=2, m=4)
WEIGHTS = "model.safetensors"


class _Small(nn.Module):
    """Two convolutions with a batch norm between, and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(4, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second, self.last = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        found: Tensor = self.last(torch.relu(self.second(x)).mean((2, 3)))
        return found


def pair(network: nn.Module, *names: str) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """A network with weights pruned by magnitude, the dense one, and the masks."""
    dense, masks = copy.deepcopy(network).eval(), {}
    with torch.no_grad():
        for name in names:
            weight = network.get_parameter(name)
            masks[name] = largest_per_group(weight, 1, TWO_FOUR)
            weight.mul_(masks[name])
    return network, dense, masks


def small(seed: int = 0) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    torch.manual_seed(seed)
    network = _Small()
    network(torch.randn(64, 4, 8, 8))  # statistics of the norm
    return pair(network, "first.weight", "second.weight")


def how(**changes: Any) -> JointFit:
    settings: dict[str, Any] = {
        "task": task_named("classification"),
        "device": torch.device("cpu"),
        "batch_size": 64,
        "n_steps": 60,
    }
    return JointFit(**settings | changes)


def samples(n: int = 200, seed: int = 1) -> Tensor:
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_a_linear_network_comes_to_the_least_squares_under_its_mask() -> None:
    torch.manual_seed(0)
    network, dense, masks = pair(nn.Sequential(nn.Linear(8, 4, bias=False)), "0.weight")
    x = torch.randn(320, 8) @ torch.randn(8, 8)
    with torch.no_grad():
        pruned = float((network(x[:-64]) - dense(x[:-64])).square().sum())
    found = fit_jointly(network, dense, masks, x, how(task=task_named("regression"), n_steps=1500))
    assert found.kept
    fitted = x[:-64].double()
    with torch.no_grad():
        wanted = dense(x[:-64]).double()
        reached = float((network(x[:-64]) - wanted).square().sum())
    least = 0.0
    for row, mask in enumerate(masks["0.weight"]):
        columns = fitted[:, mask]
        solution = torch.linalg.lstsq(columns, wanted[:, row]).solution
        least += float((columns @ solution - wanted[:, row]).square().sum())
    assert least <= reached <= 1.02 * least
    assert least < 0.8 * pruned


@pytest.mark.parametrize("augments", [False, True])
def test_outputs_come_nearer_and_zeros_and_statistics_stay(augments: bool) -> None:
    network, dense, masks = small()
    before = copy.deepcopy(network.state_dict())
    original = copy.deepcopy(dense.state_dict())
    found = fit_jointly(network, dense, masks, samples(), how(augments=augments))
    assert found.kept
    assert found.change_with < 0.9 * found.change_without
    assert (found.n_samples, found.n_steps) == (40, 60)
    assert "was kept" in str(found)
    after = network.state_dict()
    for name, mask in masks.items():
        assert not after[name][~mask].any()
        assert (after[name] != before[name])[mask].any()
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert after[name].equal(before[name])
    for name in ("first.bias", "norm.weight", "norm.bias", "last.weight"):
        assert not after[name].equal(before[name])
    assert all(value.equal(original[name]) for name, value in dense.state_dict().items())
    assert not network.training
    assert all(one.requires_grad and one.grad is None for one in network.parameters())


def test_the_samples_that_decide_are_not_fitted_to() -> None:
    states = []
    for last in (2, 3):
        network, dense, masks = small()
        x = torch.cat([samples(160), samples(40, seed=last)])
        assert fit_jointly(network, dense, masks, x, how()).kept
        states.append(network.state_dict())
    assert all(one.equal(states[1][name]) for name, one in states[0].items())


@pytest.mark.parametrize("spoilt", [5.0, float("nan")])
def test_a_fit_that_does_not_help_is_undone_to_the_bit(
    spoilt: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(network: nn.Module, *_: Any) -> None:
        with torch.no_grad():
            network.get_parameter("last.bias").fill_(spoilt)
            network.get_parameter("first.weight").mul_(spoilt)

    monkeypatch.setattr(joint, "_fit", spoil)
    network, dense, masks = small()
    before = copy.deepcopy(network.state_dict())
    found = fit_jointly(network, dense, masks, samples(), how())
    assert not found.kept
    assert "did not help" in str(found)
    assert all(value.equal(before[name]) for name, value in network.state_dict().items())


class _Picked(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(1)


@pytest.mark.parametrize(
    ("network", "n", "what"),
    [(nn.Linear(8, 4), 4, "4 samples are too few"), (_Picked(8, 4), 20, "no output of floats")],
)
def test_what_cannot_be_fitted_is_refused(network: nn.Module, n: int, what: str) -> None:
    pruned, dense, masks = pair(network, "weight")
    with pytest.raises(UsageError, match=what):
        fit_jointly(pruned, dense, masks, torch.randn(n, 8), how())


def test_joint_stands_beside_auto_and_alone() -> None:
    both, alone = recovery_from_text("auto,joint"), recovery_from_text("joint")
    assert both == Recovery(damping=True, streams=True, sums=True, bias=True, joint=True)
    assert both.of_walk == recovery_from_text("auto")
    assert alone is not None
    assert alone.of_walk is None


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The same inputs, of few directions as real ones are, with two sets of labels."""
    folder = tmp_path_factory.mktemp("data")
    found, basis = {}, np.random.default_rng(0).normal(size=(6, 64))
    for name, shift in (("right", 0), ("wrong", 1)):
        arrays: dict[str, Any] = {}
        draw = np.random.default_rng(1)
        for part, n in (("train", 400), ("test", 100)):
            labels = draw.integers(0, 4, n)
            inputs = (draw.normal(size=(n, 6)) @ basis).reshape(n, 1, 8, 8)
            arrays |= {f"x_{part}": inputs.astype(np.float32), f"y_{part}": (labels + shift) % 4}
        np.savez(folder / f"{name}.npz", **arrays)
        found[name] = f"npz:{folder / name}.npz"
    return found


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer steps than a user gets."""
    monkeypatch.setattr(pipeline, "JointFit", functools.partial(JointFit, n_steps=100))


def pruned_run(out: Path, data: str, recover: str, **options: Any) -> Sparsified:
    return sparsify(
        "digits-cnn",
        out,
        weights="random",
        data=data,
        calibration_samples=200,
        recover=recover,
        device="cpu",
        **options,
    )


@pytest.mark.usefixtures("short")
def test_a_run_is_fitted_without_labels_and_says_so(data: Mapping[str, str], tmp_path: Path) -> None:
    runs = {name: pruned_run(tmp_path / name, data[name], "bias,joint") for name in ("right", "wrong")}
    files = [(tmp_path / name / WEIGHTS).read_bytes() for name in ("right", "wrong")]
    assert files[0] == files[1]
    report = runs["right"].report
    assert report.joint is not None
    assert report.recovery is not None
    assert report.joint.kept
    assert report.recovery.steps == ("bias",)
    assert report.joint.n_samples == report.recovery.n_samples == 40
    least = min(report.recovery.change_with, report.recovery.change_without)
    assert report.joint.change_without == pytest.approx(least, rel=0.05)
    stored = json.loads((tmp_path / "right" / "sparsify.json").read_text())
    assert stored["joint"]["change_with"] == report.joint.change_with
    assert "the joint fit was kept" in report.shown().draw()
    weights, masks = load_file(tmp_path / "right" / WEIGHTS), load_file(tmp_path / "right/masks.safetensors")
    sparse = [layer.name for layer in report.layers if layer.pattern]
    assert sparse
    for name in sparse:
        assert obeys(masks[name], 1, TWO_FOUR)
        assert not weights[name][~masks[name].bool()].any()


@pytest.mark.usefixtures("short")
def test_alone_it_goes_on_from_a_walk_that_did_not_see_the_deciding_samples(
    data: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    genuine = recovering.sparsify_recovering

    def noted(*args: Any, **options: Any) -> Any:
        seen.append(sum(len(array) for feeds in options["batches"] for array in feeds.values()))
        return genuine(*args, **options)

    monkeypatch.setattr(pipeline, "sparsify_recovering", noted)
    report = pruned_run(tmp_path / "run", data["right"], "joint", method="activation").report
    assert seen == [160]
    assert report.recovery is None
    assert report.joint is not None
    assert report.joint.kept


@pytest.mark.usefixtures("short")
def test_with_another_order_of_channels_the_dense_network_has_it_too(
    data: Mapping[str, str], tmp_path: Path
) -> None:
    report = pruned_run(tmp_path / "run", data["right"], "joint", permute=True).report
    assert report.permuted_spaces
    assert report.joint is not None
    assert report.joint.change_with < report.joint.change_without < 1
    assert pruned_run(tmp_path / "without", data["right"], "none").report.joint is None


def test_a_network_that_is_pruned_as_a_graph_is_refused(tmp_path: Path) -> None:
    onnx.save(
        onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["" : 17]> g (float[N,32] x) => (float[N,32] y) { y = Relu(x) }'
        ),
        tmp_path / "net.onnx",
    )
    np.savez(tmp_path / "in.npz", x=np.zeros((9, 32), np.float32))
    arguments = [str(tmp_path / "net.onnx"), "--inputs", str(tmp_path / "in.npz"), "--recover", "auto,joint"]
    found = CliRunner().invoke(command, [*arguments, "--out", str(tmp_path / "run")])
    assert found.exit_code != 0
    assert "--recover joint was given" in str(found.exception) + found.output
