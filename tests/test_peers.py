"""The comparison with other programs: its counter of 2:4 layers is right, and `make` knows how to run it."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks.peers.counting import counted, is_two_four
from benchmarks.peers.networks import NETWORKS
from benchmarks.peers.run import table
from benchmarks.peers.tools import SIMPLIFIES, TOOLS

CHECKOUT = Path(__file__).resolve().parents[1]


def test_each_four_weights_are_two_four_when_two_or_fewer_are_not_zero() -> None:
    for four in itertools.product((0.0, 1.0), repeat=4):
        row = np.array([[0, 3, -2, 0, *four]])
        assert is_two_four(row) == (sum(four) <= 2)


def test_four_zeros_that_straddle_two_groups_are_not_two_four() -> None:
    assert not is_two_four(np.array([[1, 1, 1, 0, 0, 0, 0, 1]]))


def _graph(folder: Path, nodes: list[onnx.NodeProto], **weights: np.ndarray) -> Path:
    stored = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    onnx.save(helper.make_model(graph), folder / "m.onnx")
    return folder / "m.onnx"


def _pruned_along_the_last_axis(shape: tuple[int, ...]) -> np.ndarray:
    """Two of every four weights zero, as they lie in memory."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=shape).reshape(-1, 4)
    return np.where(
        rng.permuted(np.tile([True, True, False, False], (len(weight), 1)), axis=1), weight, 0
    ).reshape(shape)


@pytest.mark.parametrize(("turned", "n_two_four"), [(False, 0), (True, 1)])
def test_a_matmul_is_counted_down_its_first_axis(tmp_path: Path, turned: bool, n_two_four: int) -> None:
    weight = _pruned_along_the_last_axis((8, 8))
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    found = counted(_graph(tmp_path, [node], w=weight.T if turned else weight))
    assert (found.n_layers, found.n_two_four, found.n_half) == (1, n_two_four, 1)


def test_a_gemm_is_counted_as_it_uses_its_weight(tmp_path: Path) -> None:
    weight = _pruned_along_the_last_axis((8, 8))
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"], transB=1),
        helper.make_node("Gemm", ["h", "w"], ["y"]),
    ]
    found = counted(_graph(tmp_path, nodes, w=weight))
    assert (found.n_layers, found.n_two_four) == (2, 1)


def test_a_weight_that_is_turned_before_its_use_is_followed(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    assert counted(_graph(tmp_path, nodes, w=_pruned_along_the_last_axis((8, 8)))).n_two_four == 1


def test_a_convolution_is_counted_along_its_input_channels_and_not_along_its_kernel(tmp_path: Path) -> None:
    """Groups of four of the flattened weight are what sparsegpt of modelopt 0.47 prunes."""
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    by_channels = np.moveaxis(_pruned_along_the_last_axis((4, 3, 3, 8)), -1, 1)
    found = counted(_graph(tmp_path, [node], w=by_channels))
    assert (found.n_two_four, found.n_flat, found.n_half) == (1, 0, 1)
    found = counted(_graph(tmp_path, [node], w=_pruned_along_the_last_axis((4, 8, 3, 3))))
    assert (found.n_two_four, found.n_flat, found.n_half) == (0, 1, 1)


def test_what_can_be_no_two_four_layer_is_not_counted(tmp_path: Path) -> None:
    weight = np.ones((4, 4, 3, 3))
    nodes = [
        helper.make_node("Conv", ["x", "three"], ["a"]),
        helper.make_node("Conv", ["a", "grouped"], ["b"], group=4),
        helper.make_node("MatMul", ["b", "b"], ["y"]),
    ]
    assert counted(_graph(tmp_path, nodes, three=weight[:, :3], grouped=weight)).n_layers == 0


def test_make_runs_the_comparison_in_an_environment_of_its_own() -> None:
    line = [
        "make",
        "-n",
        "-W",
        "benchmarks/peers/requirements.txt",
        "bench-peers",
        "PEERS_ARGS=--network cnn",
    ]
    done = subprocess.run(line, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert "-r benchmarks/peers/requirements.txt" in done.stdout
    assert "benchmarks.peers.run --peers-python .venv-peers/bin/python --network cnn" in done.stdout


def test_the_peak_of_a_child_is_not_that_of_its_parent() -> None:
    """`ru_maxrss` survives fork and exec, so a small child of a large process seemed as large."""
    ballast = np.ones(2**25)  # 256 MB
    line = [sys.executable, "-c", "from benchmarks.peers.tools import _peak_mb; print(_peak_mb())"]
    done = subprocess.run(line, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert 0 < float(done.stdout) < ballast.nbytes / 2**20


def test_the_other_programs_are_pinned() -> None:
    lines = (CHECKOUT / "benchmarks" / "peers" / "requirements.txt").read_text().splitlines()
    pinned = {line.partition("==")[0] for line in lines if "==" in line}
    pinned |= {line.partition("==")[0] for line in (CHECKOUT / "constraints.txt").read_text().splitlines()}
    assert {line.partition("==")[0] for line in lines if line and line[0] != "#"} <= pinned


def test_the_tables_show_every_program_and_what_failed() -> None:
    counts = {"n_layers": 12, "n_two_four": 0, "n_flat": 11, "n_half": 11}
    found = {"relative_error": 0.25, "counted": counts, "inspect_two_four": 0, "n_nodes": 27}
    cost = {"cpu_s": 1.0, "peak_mb": 500.0}
    results = {
        "dense": found,
        **dict.fromkeys(TOOLS, cost | found),
        "onnxsim": {"failed": ["no such thing"]},
    }
    text = table({"cnn": {"what": "", "results": results}})
    assert "| cnn | modelopt sparsegpt | 1.0 | 500.0 | 0.250 |  | 0 of 12 (11 along the kernel) | 0 |" in text
    assert "| cnn | onnxsim | failed: no such thing |" in text
    for key, tool in TOOLS.items():
        assert f"| cnn | {tool.name} |" in text, key
    assert set(SIMPLIFIES) <= set(TOOLS)
    assert all(name == one.name for name, one in NETWORKS.items())
