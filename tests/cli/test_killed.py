"""Commands that are killed at one of their file operations: what lies there afterwards is whole, and the next
call ends as if nothing had been.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparse_export.building import build
from sparse_export.files import sha256_file
from sparse_export.formats.bundle import open_bundle
from sparse_export.formats.listed import verify_files
from sparse_export.formats.run import GRAPH_FILE, WEIGHTS_FILE, open_run, read_run_info
from sparse_export.oneshot import sparsify
from sparse_export.serving.package import package
from sparse_export.sweep.sweep import sweep
from sparse_export.train import load_recipe, train
from tests.killing import Command, killed, processes_that_name
from tests.making_runs import network_and_masks, save_run

_GRID = """
recipe = "digits"
methods = ["set"]
densities = [0.3]
seeds = [0]
changes = { epochs = 1 }
"""


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


def _swept(grid: Path, out: Path) -> object:
    return sweep(grid, out, n_jobs=1, device="cpu")


def _sweep_state(out: Path) -> str:
    if not (out / "results.json").is_file():
        return ""
    (one,) = json.loads((out / "results.json").read_bytes())["runs"]
    return _run_state(out / one["run"]) if one["status"] == "complete" else ""


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
    grid = tmp_path / "grid.toml"
    grid.write_text(_GRID)
    return {
        "train": Command(_trained, _run_state),
        "build": Command(partial(build, tmp_path / "run"), _bundle_state),
        "package": Command(partial(package, [tmp_path / "bundle"], ["m"]), _package_state),
        "sparsify": Command(partial(_sparsified, net), _run_state),
        "sweep": Command(
            partial(_swept, grid), _sweep_state, orphans=lambda _, out: processes_that_name(f"{out}/jobs")
        ),
    }


@pytest.mark.parametrize("name", ["build", pytest.param("package", marks=pytest.mark.full)])
def test_a_command_that_is_killed_at_some_of_its_file_operations(
    name: str, commands: dict[str, Command], tmp_path: Path
) -> None:
    assert killed(commands[name], tmp_path, 3) >= 2


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "build", "package", "sparsify"])
def test_a_command_that_is_killed_at_sixteen_of_its_file_operations(
    name: str, commands: dict[str, Command], tmp_path: Path
) -> None:
    """Sixty-four in all; `tests/serving/test_killed.py` kills `serve`."""
    assert killed(commands[name], tmp_path, 16) >= 14


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sweep_that_is_killed_goes_on_with_what_its_runs_have(
    commands: dict[str, Command], tmp_path: Path
) -> None:
    """The process of a run outlives its sweep by a step, and the next sweep waits for it."""
    assert killed(commands["sweep"], tmp_path, 6) >= 5
