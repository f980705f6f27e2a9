"""Our own training loop, and what it leaves on disk, whatever happens to it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sparse_export as se
from sparse_export import files, models
from sparse_export.errors import (
    ArtefactError,
    Interrupted,
    NotTrustedError,
    OutputError,
    TrainingDiverged,
    UsageError,
)
from sparse_export.formats.run import RUN_FILE, read_run_info
from sparse_export.train import checkpoint
from sparse_export.train.loop import train
from sparse_export.train.metrics import MetricsLog
from sparse_export.train.observer import SilentObserver
from sparse_export.train.recipe import Recipe, load_recipe
from tests.sealing import write_sealed

EPOCHS = 3


def small(**changes: Any) -> Recipe:
    return load_recipe("digits", changes={"epochs": EPOCHS, **changes})


def outcome(run: Path) -> tuple[bytes, bytes, list[dict[str, Any]]]:
    """Weights, masks and metrics of a run, without the wall time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"], line["step_ms"], line["update_ms"]
    return (run / "model.safetensors").read_bytes(), (run / "masks.safetensors").read_bytes(), lines


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    train(small(), run, device="cpu")
    return run


def test_a_run_says_what_it_is_and_its_files_agree(unbroken: Path) -> None:
    run = se.open_run(unbroken)
    info = run.info
    masks = load_file(unbroken / "masks.safetensors")
    weights = load_file(unbroken / "model.safetensors")
    assert info.n_active == sum(int(mask.sum()) for mask in masks.values()) == round(0.2 * info.n_masked)
    assert {fact.name: fact.n_active for fact in info.layers} == {k: int(m.sum()) for k, m in masks.items()}
    for name, mask in masks.items():
        assert not weights[name][~mask].view(torch.int32).any()
    assert info.data is not None
    assert (info.data.n_train, info.data.n_validation, info.data.n_test) == (1257, 140, 400)
    assert info.test is not None
    assert info.test.n_samples == 400
    assert info.test.figure > 60  # three epochs; chance is 10
    assert (info.n_threads, info.epochs, info.n_steps) == (1, EPOCHS, EPOCHS * (1257 // 64))
    assert json.loads((unbroken / "run.json").read_text())["recipe"]["sparsity"]["density"] == 0.2


def test_metrics_hold_a_line_an_epoch_and_no_update_after_the_last(unbroken: Path) -> None:
    lines = outcome(unbroken)[2]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert [line["prune_rate"] is None for line in lines] == [False, False, True]
    assert all(0 < line["flip_rate"] < 0.5 for line in lines[:2])
    assert lines[0]["train_loss"] > lines[2]["train_loss"]
    assert all(line["density"] == pytest.approx(0.2, abs=1e-4) for line in lines)


def test_tensorboard_finds_the_course_of_the_run(unbroken: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(unbroken / "tensorboard")).Reload()
    losses = [event.value for event in events.Scalars("loss/train")]
    assert losses == pytest.approx([line["train_loss"] for line in outcome(unbroken)[2]])


def test_the_same_recipe_gives_the_same_bytes(unbroken: Path, tmp_path: Path) -> None:
    train(small(), tmp_path / "again", device="cpu")
    assert outcome(tmp_path / "again") == outcome(unbroken)


def test_the_dense_twin_has_no_masks_and_the_same_start(tmp_path: Path) -> None:
    run = train(small(dense=True), tmp_path / "dense", device="cpu")
    assert load_file(tmp_path / "dense" / "masks.safetensors") == {}
    assert (run.info.method, run.info.density, run.info.n_active) == ("dense", 1.0, run.info.n_masked)


class KillAtStep(SilentObserver):
    def __init__(self, step: int) -> None:
        self.step = step

    def stepped(self, step: int, loss: torch.Tensor) -> None:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after_calls(
    n_calls: int, function: Callable[..., Any], then: Callable[..., Any] = die
) -> Callable[..., Any]:
    """`function`, which at its n-th call is replaced by `then`."""
    done = 0

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal done
        done += 1
        return then(*arguments, **named) if done == n_calls else function(*arguments, **named)

    return counted


def write_half_and_die(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.with_name(f".{path.name}.1.tmp").open("wb") as stream:
        stream.write(content[: len(content) // 2])
        stream.flush()
        os.fsync(stream.fileno())
    die()


def killed_run(out: str, moment: str) -> None:
    """Runs in a child process and is killed, for good, at the named moment."""
    observer = SilentObserver()
    patch = pytest.MonkeyPatch()
    patch.setattr(MetricsLog, "__exit__", lambda *_: None)  # nothing tidies up after a kill
    if moment.startswith("step"):
        observer = KillAtStep(int(moment.removeprefix("step ")))
    elif moment == "metrics written, state not":
        patch.setattr("sparse_export.train.session.save_state", after_calls(2, checkpoint.save_state))
    elif moment == "half of a state written":
        patch.setattr(checkpoint, "write_bytes", after_calls(2, files.write_bytes, write_half_and_die))
    elif moment == "state written, not renamed":
        patch.setattr(Path, "replace", after_calls(3, Path.replace))  # run.json, state, state
    elif moment == "state renamed, folder not flushed":
        patch.setattr(files, "_sync_folder", after_calls(3, files._sync_folder))
    elif moment == "weights written, run.json not":
        patch.setattr("sparse_export.train.run_folder.write_run_info", die)
    train(small(), out, device="cpu", observer=observer)


def in_child(target: Callable[..., None], *arguments: str) -> int | None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["sparse_export.train.session", "sklearn.datasets", "torch.utils.tensorboard"]
    )
    process = context.Process(target=target, args=arguments)
    process.start()
    process.join(120)
    return process.exitcode


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("step 1", marks=pytest.mark.full),
        pytest.param("step 19", marks=pytest.mark.full),
        "step 30",
        pytest.param("step 57", marks=pytest.mark.full),
        pytest.param("metrics written, state not", marks=pytest.mark.full),
        "half of a state written",
        pytest.param("state written, not renamed", marks=pytest.mark.full),
        pytest.param("state renamed, folder not flushed", marks=pytest.mark.full),
        "weights written, run.json not",
    ],
)
def test_a_run_killed_at_any_moment_ends_with_the_bits_of_an_unbroken_one(
    moment: str, unbroken: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert in_child(killed_run, str(out), moment) == -signal.SIGKILL
    assert read_run_info(out).status == "running"
    with pytest.raises(ArtefactError, match=r"not finished.*train --resume"):
        se.open_run(out)
    train(None, out, device="cpu", resume=True)
    assert outcome(out) == outcome(unbroken)
    assert not list(out.rglob("*.tmp"))


class InterruptAtStep(SilentObserver):
    def __init__(self, step: int, number: signal.Signals) -> None:
        self.step, self.number = step, number

    def stepped(self, step: int, loss: torch.Tensor) -> None:
        if step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_in_the_middle_of_an_epoch_and_says_how_to_go_on(
    number: signal.Signals, unbroken: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    handler = signal.getsignal(number)
    with pytest.raises(Interrupted, match=r"step 25 of 57.*--resume --out") as caught:
        train(small(), out, device="cpu", observer=InterruptAtStep(25, number))
    assert caught.value.exit_code == 130
    assert signal.getsignal(number) is handler
    assert json.loads(_header(out)["position"])["step"] == 25
    train(None, out, device="cpu", resume=True)
    assert outcome(out) == outcome(unbroken)


@pytest.mark.parametrize(
    "changes",
    [
        {"sparsity": {"density": 0.2, "update_every": 7}},
        {"optimizer": {"name": "adam", "lr": 1e-3}},
        {"dense": True},
        {"validation_fraction": 0.0},
        {"augment": "crop-flip", "label_smoothing": 0.1, "learning_rate": {"warmup": 0.2}},
    ],
    ids=["steps", "adam", "dense", "all for training", "augmented"],
)
def test_other_recipes_resume_to_the_same_bits_after_two_interruptions(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    train(small(**changes), tmp_path / "whole", device="cpu")
    out = tmp_path / "broken"
    with pytest.raises(Interrupted):
        train(small(**changes), out, device="cpu", observer=InterruptAtStep(9, signal.SIGINT))
    with pytest.raises(Interrupted):
        train(None, out, device="cpu", resume=True, observer=InterruptAtStep(26, signal.SIGTERM))
    train(None, out, device="cpu", resume=True)
    assert outcome(out) == outcome(tmp_path / "whole")


def test_a_resumed_run_keeps_the_command_that_started_it_and_its_hint_can_be_pasted(tmp_path: Path) -> None:
    out = tmp_path / "my run"
    with pytest.raises(Interrupted, match=r"--out '.*my run' --data-dir '?/some"):
        train(
            small(),
            out,
            data_dir=Path("/some where"),
            device="cpu",
            observer=InterruptAtStep(5, signal.SIGINT),
        )
    command = read_run_info(out).command
    assert train(None, out, resume=True).info.command == command


def test_a_run_json_whose_recipe_names_another_network_is_refused_before_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(small(), out, device="cpu", observer=InterruptAtStep(5, signal.SIGINT))
    (tmp_path / "evil_net.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    document = json.loads((out / "run.json").read_text())
    document["recipe"]["model"] = "evil_net:make"
    write_sealed(out / "run.json", document)
    with pytest.raises(ArtefactError, match="contradicts itself"):
        train(None, out, resume=True)
    document["model"]["name"] = "evil_net:make"
    write_sealed(out / "run.json", document)
    with pytest.raises(NotTrustedError, match="--trust"):
        train(None, out, resume=True)


def test_a_resume_on_other_data_is_refused(tmp_path: Path) -> None:
    def write(n_samples: int) -> None:
        rng = np.random.default_rng(0)
        x = rng.integers(0, 255, (n_samples, 8, 8, 1), dtype=np.uint8)
        y = np.arange(n_samples) % 10
        np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x[:50], y_test=y[:50])

    write(200)
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        recipe = small(data=f"npz:{tmp_path / 'd.npz'}", batch_size=20)
        train(recipe, out, device="cpu", observer=InterruptAtStep(5, signal.SIGINT))
    write(300)
    with pytest.raises(ArtefactError, match="data differ"):
        train(None, out, resume=True)


def test_tied_weights_are_saved_resumed_and_plus_zero_under_both_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tied_net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)\n"
        "        self.b.weight = self.a.weight\n"
        "    def forward(self, x):\n"
        "        return self.c(self.b(self.a(x.flatten(1)).relu()).relu())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(small(model="tied_net:Net"), out, device="cpu", observer=InterruptAtStep(25, signal.SIGINT))
    train(None, out, device="cpu", resume=True)
    weights, masks = load_file(out / "model.safetensors"), load_file(out / "masks.safetensors")
    assert set(masks) == {"a.weight", "c.weight"}
    assert torch.equal(weights["a.weight"], weights["b.weight"])
    assert not weights["b.weight"][~masks["a.weight"]].view(torch.int32).any()


def test_an_interrupt_at_the_last_step_of_an_epoch_can_be_resumed(unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Interrupted, match=r"step 19 of 57"):
        train(small(), out, device="cpu", observer=InterruptAtStep(19, signal.SIGINT))
    train(None, out, device="cpu", resume=True)
    assert outcome(out) == outcome(unbroken)


def _header(run: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(checkpoint.state_path(run), framework="pt") as file:
        return dict(file.metadata())


def test_resume_uses_the_recorded_threads_and_returns_a_finished_run_as_it_is(
    unbroken: Path, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*") if path.is_file()}
    run = train(None, unbroken, resume=True)
    assert run.info.status == "complete"
    assert before == {path: path.stat().st_mtime_ns for path in unbroken.rglob("*") if path.is_file()}

    out = tmp_path / "two"
    with pytest.raises(Interrupted):
        train(small(threads=2), out, device="cpu", observer=InterruptAtStep(5, signal.SIGINT))
    torch.set_num_threads(1)
    assert train(None, out, device="cpu", resume=True).info.n_threads == 2


def test_training_leaves_threads_and_denormals_as_they_were(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    train(small(epochs=1, threads=before + 1), tmp_path / "run", device="cpu")
    assert torch.get_num_threads() == before
    assert (torch.tensor([1e-38]) * 0.01).item() > 0


def test_a_run_is_never_written_over_another(unbroken: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="already holds a run"):
        train(small(), unbroken)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="already holds something else"):
        train(small(), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_run_that_failed_before_its_first_state_is_in_nobodys_way(tmp_path: Path) -> None:
    class FailsAtFirst(SilentObserver):
        def stepped(self, *_: Any) -> None:
            raise ZeroDivisionError

    out = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        train(small(epochs=1), out, device="cpu", observer=FailsAtFirst())
    assert (out / RUN_FILE).is_file()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="already holds a run"):
        train(small(epochs=1), out, device="cpu")
    (out / "notes.txt").unlink()
    assert train(small(epochs=1), out, device="cpu").info.status == "complete"


def test_a_folder_that_cannot_be_made_is_an_error_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Cannot write"):
        train(small(), tmp_path / "file" / "run")


def test_a_full_disk_keeps_the_last_good_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"

    def full(path: Path, content: bytes) -> None:
        raise files.output_error(path, OSError(28, "No space left on device"))

    monkeypatch.setattr(checkpoint, "write_bytes", after_calls(2, files.write_bytes, full))
    with pytest.raises(OutputError, match="No space left"):
        train(small(), out, device="cpu")
    monkeypatch.undo()
    assert json.loads(_header(out)["position"])["epoch"] == 1
    assert train(None, out, device="cpu", resume=True).info.status == "complete"


class Poison(SilentObserver):
    """Makes a weight of the network in training NaN after a step."""

    def __init__(self, step: int, patch: pytest.MonkeyPatch) -> None:
        self.step = step
        self.parameters: list[torch.nn.Parameter] = []
        create = models.create

        def spied(name: str, n_classes: int | None = None) -> torch.nn.Module:
            model = create(name, n_classes)
            self.parameters.extend(model.parameters())
            return model

        patch.setattr("sparse_export.train.network.models.create", spied)

    def stepped(self, step: int, loss: torch.Tensor) -> None:
        if step == self.step:
            self.parameters[0].data.fill_(float("nan"))


def test_a_loss_that_is_no_number_stops_with_the_last_good_state_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with pytest.raises(TrainingDiverged, match=r"Step 31 of 57: The loss.*optimizer\.lr.*last good state"):
        train(small(), out, device="cpu", observer=Poison(30, monkeypatch))
    assert json.loads(_header(out)["position"])["epoch"] == 1
    assert all(
        torch.isfinite(t).all()
        for t in load_file(checkpoint.state_path(out)).values()
        if t.is_floating_point()
    )


@pytest.mark.parametrize("dense", [True, False])
def test_weights_that_are_no_numbers_after_the_last_step_are_not_called_a_finished_run(
    dense: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with pytest.raises(TrainingDiverged, match="Step 19 of 19: The weights are no longer numbers"):
        train(small(epochs=1, dense=dense), out, device="cpu", observer=Poison(19, monkeypatch))
    assert read_run_info(out).status == "running"
    assert not checkpoint.state_path(out).exists()


def test_a_learning_rate_that_blows_up_ends_with_a_message_and_no_traceback(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match=r"no longer.*Lower optimizer\.lr"):
        train(small(optimizer={"lr": 1e20}), tmp_path / "run", device="cpu")
    assert read_run_info(tmp_path / "run").status == "running"


def test_a_network_that_cannot_take_the_data_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UsageError, match=r"lenet5 cannot take inputs of shape \(1, 8, 8\) and type float32 from digits"
    ):
        train(small(model="lenet5"), tmp_path / "run")
    (tmp_path / "narrow_net.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"Logits of shape \(2, 10\)"):
        train(small(model="narrow_net:make"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_no_picture_cannot_be_cropped(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 255, (40, 4, 4, 1), dtype=np.uint8)
    np.savez(tmp_path / "tiny.npz", x_train=x, y_train=np.arange(40) % 3, x_test=x, y_test=np.arange(40) % 3)
    with pytest.raises(UsageError, match=r"crop-flip.*\(1, 4, 4\)"):
        train(small(data=f"npz:{tmp_path / 'tiny.npz'}", augment="crop-flip"), tmp_path / "run")


@pytest.mark.parametrize("model", ["digits-cnn", "single_output:make"])
def test_a_network_with_one_output_is_refused_before_it_is_trained(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "single_output.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 1))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    x = np.zeros((40, 8, 8, 1), np.uint8)
    y: np.ndarray = np.zeros(40, int) if model == "digits-cnn" else np.arange(40) % 2
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    with pytest.raises(
        UsageError, match=rf"model {model} has one output, so its top-1 .*one output per class"
    ):
        train(small(model=model, data=f"npz:{tmp_path / 'd.npz'}"), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_the_network_gets_as_many_outputs_as_the_data_has_classes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 255, (40, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "few.npz", x_train=x, y_train=np.arange(40) % 3, x_test=x, y_test=np.arange(40) % 3)
    run = train(small(data=f"npz:{tmp_path / 'few.npz'}", epochs=1, batch_size=8), tmp_path / "run")
    assert run.info.signature.n_classes == 3
    assert load_file(tmp_path / "run" / "model.safetensors")["fc2.weight"].shape == (3, 64)
    assert se.build(tmp_path / "run").info.signature.n_classes == 3


def test_a_truncated_or_foreign_state_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(small(), out, device="cpu", observer=InterruptAtStep(5, signal.SIGINT))
    state = checkpoint.state_path(out)
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtefactError, match="cannot be read"):
        train(None, out, device="cpu", resume=True)
    other = tmp_path / "other"
    rng = np.random.default_rng(0)
    x = rng.integers(0, 255, (50, 28, 28, 1), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", x_train=x, y_train=np.arange(50) % 10, x_test=x, y_test=np.arange(50) % 10)
    with pytest.raises(Interrupted):
        train(
            small(model="lenet300-100", data=f"npz:{tmp_path / 'd.npz'}", batch_size=5),
            other,
            device="cpu",
            observer=InterruptAtStep(3, signal.SIGINT),
        )
    state.write_bytes(checkpoint.state_path(other).read_bytes())
    with pytest.raises(ArtefactError, match="does not belong to this network"):
        train(None, out, device="cpu", resume=True)
