"""Commands that are killed at one of their file operations: what lies there afterwards is whole, and the next
call ends as if nothing had been.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from sparse_export.building import build
from sparse_export.errors import SparseExportError
from sparse_export.files import sha256_file
from sparse_export.formats.bundle import open_bundle
from sparse_export.formats.listed import verify_files
from sparse_export.formats.run import GRAPH_FILE, WEIGHTS_FILE, open_run, read_run_info
from sparse_export.oneshot import sparsify
from sparse_export.serving.package import package
from sparse_export.train import load_recipe, train
from tests.making_runs import network_and_masks, save_run

_OPERATIONS = frozenset(("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"))
_kill: dict[str, int] = {}


def _at_operation(event: str, arguments: tuple[Any, ...]) -> None:
    """Count changes of the file system, and end the process by SIGKILL right before one of them."""
    if not _kill:
        return
    writes = event == "open" and isinstance(arguments[1], str) and bool(set(arguments[1]) & set("wxa+"))
    if writes or event in _OPERATIONS:
        _kill["n"] += 1
        if _kill["n"] == _kill["at"]:
            os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(_at_operation)


def _child(work: Callable[[Path], object], folder: Path, at: int, told: Connection) -> None:
    """Do work, and tell how many operations there were; the process is killed at one of them, 0 for none."""
    torch.set_num_threads(1)
    _kill.update(n=0, at=at)
    try:
        work(folder)
    except SparseExportError as error:
        os.write(2, f"{error}\n".encode())
        sys.exit(1)
    finally:
        told.send(_kill["n"])


def forked(work: Callable[[Path], object], folder: Path, at: int) -> tuple[int, int]:
    """Do work in a process of its own: its exit code, and how many operations there were.

    It is forked from a server that never computed a gradient: torch cannot in a fork of one that did.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])
    here, there = server.Pipe(duplex=False)
    process = server.Process(target=_child, args=(work, folder, at, there))
    process.start()
    there.close()
    try:
        n = here.recv()
    except EOFError:
        n = 0
    process.join()
    assert process.exitcode is not None
    return process.exitcode, n


@dataclass(frozen=True)
class Command:
    """work: into a folder. state: what is there, whole, in a word; "" for nothing. Raises for what is torn."""

    work: Callable[[Path], object]
    state: Callable[[Path], str]


def _trained(out: Path) -> object:
    recipe = load_recipe("digits", changes={"epochs": 2, "sparsity": {"density": 0.3}})
    begun = (out / "run.json").is_file()
    return train(None if begun else recipe, out, device="cpu", resume=begun)


def _sparsified(net: str, out: Path) -> object:
    return None if _run_state(out) else sparsify(net, out, method="magnitude")


def _run_state(out: Path) -> str:
    if not (out / "run.json").is_file():
        return ""
    info = read_run_info(out)
    verify_files(out, info.files)
    if info.status != "complete":
        return ""
    file = WEIGHTS_FILE if WEIGHTS_FILE in info.files else GRAPH_FILE
    return sha256_file(open_run(out).path / file)


def _bundle_state(out: Path) -> str:
    return sha256_file(open_bundle(out).onnx_path) if out.exists() else ""


def _package_state(out: Path) -> str:
    if not out.exists():
        return ""
    (model,) = out.glob("model_repository/*-python/1/model.onnx")
    assert (out / "package.json").is_file()
    return sha256_file(model)


@pytest.fixture
def commands(tmp_path: Path) -> dict[str, Command]:
    module, masks = network_and_masks(density=0.5)
    save_run(tmp_path / "run", module, masks)
    build(tmp_path / "run", tmp_path / "bundle")
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=size).astype(np.float32) for size in ((64, 32), (16, 64))]
    nodes = [
        helper.make_node("Gemm", ["x", "a"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "b"], ["y"], transB=1),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size])
        for name, size in (("x", 32), ("y", 16))
    ]
    stored = [numpy_helper.from_array(one, name) for one, name in zip(weights, "ab", strict=True)]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10),
        tmp_path / "net.onnx",
    )
    net = str(tmp_path / "net.onnx")
    return {
        "train": Command(_trained, _run_state),
        "build": Command(partial(build, tmp_path / "run"), _bundle_state),
        "package": Command(partial(package, [tmp_path / "bundle"], ["m"]), _package_state),
        "sparsify": Command(partial(_sparsified, net), _run_state),
    }


def _killed(command: Command, folder: Path, wanted: int) -> int:
    """Kill a command at so many of its operations, spread over all; how many times it was."""
    whole = folder / "whole"
    status, n = forked(command.work, whole, at=0)
    assert status == 0
    right = command.state(whole)
    assert right
    n_killed = 0
    for i in range(wanted):
        at = 1 + i * (n - 1) // max(wanted - 1, 1)
        out = folder / f"at{at}" / "out"
        out.parent.mkdir(exist_ok=True)
        status, _ = forked(command.work, out, at=at)
        n_killed += status == -signal.SIGKILL
        assert command.state(out) in ("", right), at
        status, _ = forked(command.work, out, at=0)
        assert status == 0, at
        assert command.state(out) == right, at
        left = [entry.name for entry in out.parent.iterdir() if entry.name.endswith(".tmp")]
        assert left == [], at
    return n_killed


@pytest.mark.parametrize("name", ["build", "package"])
def test_a_command_that_is_killed_at_some_of_its_file_operations(
    name: str, commands: dict[str, Command], tmp_path: Path
) -> None:
    assert _killed(commands[name], tmp_path, 3) >= 2


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "build", "package", "sparsify"])
def test_a_command_that_is_killed_at_sixteen_of_its_file_operations(
    name: str, commands: dict[str, Command], tmp_path: Path
) -> None:
    """Sixty-four in all."""
    assert _killed(commands[name], tmp_path, 16) >= 14
