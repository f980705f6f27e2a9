"""A second process that would write the same folder is refused before it does anything; readers are not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparse_export as se
from sparse_export.cli._demo_run import demo
from sparse_export.errors import FolderInUse
from sparse_export.files import write_json
from sparse_export.files.locks import lock_path
from sparse_export.oneshot import sparsify
from sparse_export.serving.package import package
from sparse_export.sweep import run_list
from sparse_export.sweep import run_worker as sweep_cell
from sparse_export.sweep.grid import load_grid
from sparse_export.sweep.sweep import sweep
from sparse_export.train.distributed import is_first_process
from sparse_export.train.loop import train
from sparse_export.train.observer import SilentObserver
from sparse_export.train.recipe import load_recipe
from sparse_export.train.sparse_training import SparseTraining
from tests.files.test_locks import held_elsewhere
from tests.making_runs import network_and_masks, save_run

DIGITS = load_recipe("digits", changes={"epochs": 1})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_run(tmp_path_factory.mktemp("run") / "run")


def made_run(folder: Path) -> Path:
    return save_run(folder, *network_and_masks(density=0.1), recipe=DIGITS.model_dump(mode="json")).path


def own_loop(out: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    trainer = SparseTraining(
        module, torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9), density=0.5, total_steps=2
    )
    trainer.run(out, input_shape=(4,))


@pytest.fixture
def writers(run: Path, tmp_path: Path) -> dict[str, Callable[[Path], object]]:
    grid = tmp_path / "grid.toml"
    grid.write_text('recipe = "digits"\nmethods = ["static"]\ndensities = [0.1]\nchanges = { epochs = 1 }\n')
    return {
        "train": lambda out: train(DIGITS, out, device="cpu"),
        "an own loop": own_loop,
        "sparsify": lambda out: sparsify(run, out, data="none"),
        "sweep": lambda out: sweep(grid, out, device="cpu"),
        "build": lambda out: se.build(run, out),
        "package": lambda out: package([run], [None], out),
        "demo": lambda out: demo(out, observe=lambda _: pytest.fail("it began"), say=print),
    }


def test_every_command_refuses_a_folder_that_another_process_is_writing(
    writers: dict[str, Callable[[Path], object]], tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "out"
    out.parent.mkdir()
    with held_elsewhere(out) as process:
        for name, write in writers.items():
            with pytest.raises(FolderInUse, match=f"is being written by process {process.pid} on "):
                write(out)
            assert [path.name for path in out.parent.iterdir()] == [".out.lock"], name


def refused_in_another_thread(write: Callable[[], object]) -> str:
    """What a second writer is told; a thread has no part in the locks of another."""
    said: list[str] = []

    def second() -> None:
        try:
            write()
        except FolderInUse as error:
            said.append(str(error))

    thread = threading.Thread(target=second)
    thread.start()
    thread.join()
    return said[0]


def test_of_two_trainings_into_one_folder_the_second_is_refused_and_the_first_is_whole(
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    said: list[str] = []

    class Meanwhile(SilentObserver):
        def stepped(self, step: int, loss: torch.Tensor) -> None:
            if step == 3:
                said.append(refused_in_another_thread(lambda: train(DIGITS, out, device="cpu")))
                said.append(refused_in_another_thread(lambda: train(None, out, device="cpu", resume=True)))

    made = train(DIGITS, out, device="cpu", observer=Meanwhile())
    assert [text.startswith(f"{out} is being written by process ") for text in said] == [True, True]
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1
    assert se.open_run(out).info == made.info
    assert not lock_path(out).exists()


def test_a_sweep_holds_its_folder_to_the_end(tmp_path: Path) -> None:
    grid, out = tmp_path / "grid.toml", tmp_path / "out"
    grid.write_text('recipe = "digits"\nmethods = ["static"]\ndensities = [0.1]\nchanges = { epochs = 1 }\n')
    (only,) = run_list.cells_of(load_grid(grid))
    said: list[str] = []

    def say(_: str) -> None:
        said.append(refused_in_another_thread(lambda: sweep(grid, out, device="cpu")))

    complete = save_run(
        out / "runs" / only.name,
        *network_and_masks(density=0.1),
        recipe=only.recipe.model_dump(mode="json"),
    )
    for left in (out / ".results.json.0123abcd.tmp", out / "jobs" / ".x.json.12.tmp"):
        left.parent.mkdir(exist_ok=True)
        left.touch()
    result = sweep(grid, out, device="cpu", say=say)
    assert result.findings[0].run == complete.path
    assert said
    assert all(text.startswith(f"{out} is being written by") for text in said)
    assert not list(out.rglob("*.tmp"))


def test_a_cell_waits_for_one_of_a_killed_sweep_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, job = made_run(tmp_path / "run"), tmp_path / "job.json"
    recipe = DIGITS.model_dump(mode="json")
    fields: dict[str, Any] = {"out": str(run), "recipe": recipe, "data_dir": None, "download": False}
    write_json(job, {**fields, "device": "cpu", "parent": 1})
    with held_elsewhere(run) as process:
        timer = threading.Timer(0.3, process.kill)
        timer.start()
        assert sweep_cell.main(job) == 0
        timer.join()
    monkeypatch.setattr(sweep_cell, "_ORPHAN_S", 0.05)
    with held_elsewhere(run) as process:
        assert sweep_cell.main(job) == 2
        assert f"is being written by process {process.pid} on " in capsys.readouterr().err


def test_readers_take_no_lock(run: Path, tmp_path: Path) -> None:
    with held_elsewhere(run):
        assert train(None, run, resume=True).info == se.open_run(run).info
        bundle = se.build(run, tmp_path / "bundle")
    with held_elsewhere(bundle.path):
        assert se.open_bundle(bundle.path).info == bundle.info
        package([bundle.path], [None], tmp_path / "package", runtimes=["onnxruntime"])


def test_a_run_begins_without_the_files_that_killed_processes_left_in_it(tmp_path: Path) -> None:
    run = tmp_path / "run"

    class Look(SilentObserver):
        def started(self, *_: object) -> None:
            assert not list(run.rglob("*.tmp"))

    (run / "resume").mkdir(parents=True)
    left = [run / ".run.json.12.tmp", run / "resume" / ".state.safetensors.0123abcd.tmp"]
    for file in left:
        file.touch()
    with pytest.raises(se.SparseExportError, match="already holds something else"):  # the folder resume
        train(DIGITS, run, device="cpu")
    assert [file.exists() for file in left] == [False, False]
    (run / "resume").rmdir()
    left[0].touch()
    train(DIGITS, run, device="cpu", observer=Look())


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    monkeypatch.setenv("WORLD_SIZE", "2")
    yield lambda rank: monkeypatch.setenv("RANK", str(rank))


def test_of_several_processes_of_one_training_the_first_locks(torchrun: Callable[[int], None]) -> None:
    torchrun(0)
    assert is_first_process()
    torchrun(1)
    assert not is_first_process()
