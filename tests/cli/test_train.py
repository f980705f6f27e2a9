"""`train` from the command line, as a person uses it."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from click.testing import CliRunner

from sparse_export.cli._progress import _Bar
from sparse_export.cli.main import cli
from tests.cli.conftest import Call

CHECKOUT = Path(__file__).resolve().parents[2]


def program(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In this process: another one would load torch again."""
    done = CliRunner().invoke(cli, words, prog_name="sparse-export", env=environment)
    return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped by SIGINT once its first epoch was done."""
    out = tmp_path_factory.mktemp("train") / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "sparse_export", "train", "digits", "--epochs", "12", "--out", str(out)],
        cwd=CHECKOUT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "epoch 1/12" in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 130
    assert f"sparse-export train --resume --out {out}" in rest
    return out


def test_a_resumed_run_ends_with_the_figures_in_one_json_document(interrupted: Path) -> None:
    done = program("train", "--resume", "--out", str(interrupted), "--json", SPARSE_EXPORT_TRAIN_SEED="7")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["test_score"] > 95
    assert (document["n_active"], document["seed"]) == (8042, 0)
    assert document["density"] == pytest.approx(0.2, abs=1e-4)
    assert document["seconds"] > 0
    assert document["speed"]["step_ms"] > 0
    assert document["speed"]["estimate_macs"] > 1
    text = program("train", "--resume", "--out", str(interrupted)).stdout  # of a complete run: it is shown
    assert f"time of a step: {document['speed']['step_ms']:.4g} ms, measured, mask updates included" in text
    assert "estimates: " in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resume"], "--resume takes --out RUN"),
        (["digits", "--resume", "--out", "x"], "leave out recipe"),
        (["--resume", "--out", "x", "--density", "0"], "leave out density"),
        ([], "Missing argument 'RECIPE'"),
        (["digits", "--dense", "--density", "0.1"], "exclude each other"),
        (
            ["digits", "--method", "dense", "--density", "0.1"],
            "--method dense and --density exclude each other",
        ),
        (["digits", "--trust", "ab" * 32], "--trust belongs to --resume"),
        (["digits", "--density", "1.5"], "density is 1.5"),
        (["digits", "--epochs", "0"], "epochs is 0"),
        (["digitz"], "Did you mean 'digits'"),
        (["digits", "--cuda-graph", "--device", "cpu"], "cuda_graph is set, on cpu"),
        (["--resume", "--out", "no/such/run"], "no/such/run does not exist"),
    ],
)
def test_words_that_cannot_be_meant_end_with_two(words: list[str], message: str, tmp_path: Path) -> None:
    done = program("train", *words, COLUMNS="200", NO_COLOR="1")
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_asked_for_csr_products_every_weight_is_listed_with_its_reason(tmp_path: Path) -> None:
    words = ("train", "digits", "--epochs", "1", "--products", "csr", "--device", "cpu")
    done = program(*words, "--out", str(tmp_path / "run"), "--json")
    assert done.returncode == 0, done.stderr
    assert ", 1 epoch, 19 steps, cpu, " in done.stderr
    facts = {fact["name"]: fact for fact in json.loads(done.stdout)["products"]}
    assert set(facts) == {"conv1.weight", "conv2.weight", "conv3.weight", "fc1.weight", "fc2.weight"}
    assert facts["conv1.weight"]["by"] == "dense"
    assert facts["conv1.weight"]["reason"] == "Conv2d is no plain Linear layer"
    assert all(fact["reason"] for fact in facts.values())


def test_a_missing_data_set_ends_with_five_and_the_ways_to_get_it(tmp_path: Path) -> None:
    done = program("train", "mnist-lenet5", "--data-dir", str(tmp_path), "--out", str(tmp_path / "run"))
    assert done.returncode == 5
    assert str(tmp_path / "MNIST") in done.stderr
    assert "--download" in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_unknown_model_or_data_set_in_a_recipe_names_the_nearest(tmp_path: Path) -> None:
    for text, near in (
        ('model = "lenet6"\ndata = "digits"', "lenet5"),
        ('model = "lenet5"\ndata = "mnst"', "mnist"),
    ):
        (tmp_path / "r.toml").write_text(f"{text}\nepochs = 1\n")
        done = program("train", str(tmp_path / "r.toml"), "--out", str(tmp_path / "run"))
        assert done.returncode == 2
        assert f"Did you mean '{near}'" in done.stderr
        assert not (tmp_path / "run").exists()


def test_a_terminal_gets_a_bar_and_stdout_stays_for_the_result(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "sparse_export",
            "train",
            "digits",
            "--epochs",
            "4",
            "--out",
            str(tmp_path / "r"),
        ],
        cwd=CHECKOUT,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "140"},
        stdin=slave,
        stdout=subprocess.PIPE,
        stderr=slave,
        text=True,
    )
    os.close(slave)
    seen = b""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        try:
            part = os.read(master, 65536)
        except OSError:  # Linux says so when the other side is closed
            break
        if not part:
            break
        seen += part
    os.close(master)
    assert process.stdout is not None
    result = process.stdout.read()
    process.stdout.close()
    assert process.wait(30) == 0
    text = seen.decode(errors="replace")
    for word in ("loss", "density 0.200", "steps/s", "validation"):
        assert word in text
    assert "\x1b[" in text
    assert "test accuracy" in result
    assert "\x1b[" not in result


def test_the_bar_reads_a_loss_with_its_gradient_without_a_warning() -> None:
    bar = _Bar("")
    bar._total, bar._density, bar._first = 10, 0.2, (0, 0.0)
    bar.stepped(10, torch.ones((), requires_grad=True) * 2)
    bar.close()
    assert "left  loss 2.000" in bar._bar.line().plain


def test_the_bar_shows_a_score_in_its_own_unit() -> None:
    bar = _Bar("")
    bar._total, bar._density, bar._epochs, bar._first = 10, 0.2, 5, (0, 0.0)
    bar.finished_epoch(cast(Any, SimpleNamespace(epoch=1, validation_score=1.07, validation="1.07")))
    bar.stepped(10, torch.ones(()))
    bar.close()
    assert "loss 1.000  validation 1.07  " in bar._bar.line().plain


def test_an_epoch_line_names_the_score(call: Call, tmp_path: Path) -> None:
    told = call("train", "digits", "--dense", "--epochs", 1, "--out", tmp_path / "run", "--device", "cpu")
    assert told.exit_code == 0, told.stderr
    assert re.search(r"validation accuracy \d+\.\d\d %", told.stderr)
    assert "by zero" not in told.stdout
