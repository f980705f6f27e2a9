"""`inspect --trt-log --trt-layers` on a graph, as a user types it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

from sparse_export.cli.main import cli
from tests.cli.conftest import Made

LOGS = Path(__file__).parents[1] / "engines" / "logs"


def _two_four(*shape: int) -> Any:
    values = np.ones(shape, np.float16)
    values[:, ::4] = values[:, 1::4] = 0
    return values


def _graph(file: Path, first: str = "wide") -> Path:
    """Convolutions that are wide, small and grouped, and a product that a plugin computes."""
    weights = {
        first: _two_four(256, 256, 1, 1),
        "small": _two_four(64, 256, 1, 1),
        "grouped": _two_four(64, 32, 1, 1),
        "head": _two_four(256, 64),
    }
    nodes = [
        helper.make_node("Conv", ["x", f"{first}.weight"], ["a"], name=first),
        helper.make_node("Relu", ["a"], ["h1"], name="relu1"),
        helper.make_node("Conv", ["h1", "small.weight"], ["h2"], name="small"),
        helper.make_node("Conv", ["h2", "grouped.weight"], ["h3"], name="grouped", group=2),
        helper.make_node("GlobalAveragePool", ["h3"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "head.weight"], ["y"], name="head", transB=1),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT16, ["n", 256, 8, 8])],
        [value("y", TensorProto.FLOAT16, ["n", 256])],
        [numpy_helper.from_array(weight, f"{name}.weight") for name, weight in weights.items()],
    )
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), file)
    return file


def _quantized(file: Path) -> Path:
    """One int8 product by Q/DQ, whose output stays float."""
    node = helper.make_node
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        node("DequantizeLinear", ["fc.weight", "s", "z"], ["wd"]),
        node("Gemm", ["xd", "wd"], ["y"], name="fc", transB=1),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, ["n", 512])],
        [value("y", TensorProto.FLOAT, ["n", 512])],
        [
            numpy_helper.from_array(_two_four(512, 512).astype(np.int8), "fc.weight"),
            numpy_helper.from_array(np.array(0.1, np.float32), "s"),
            numpy_helper.from_array(np.array(0, np.int8), "z"),
        ],
    )
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), file)
    return file


def _call(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["inspect", *map(str, arguments)])


def _rows(result: Result) -> dict[str, tuple[str, str]]:
    assert result.exit_code == 0, result.output
    return {
        row["node"]: (row["state"], row["text"]) for row in json.loads(result.stdout)["foreign"]["layers"]
    }


def test_the_table_and_the_document_say_what_became_of_each_layer(tmp_path: Path) -> None:
    file, log = _graph(tmp_path / "m.onnx"), LOGS / "trtexec-verbose.txt"
    rows = _rows(_call(file, "--trt-log", log, "--json"))
    assert {node: state for node, (state, _) in rows.items()} == {
        "wide": "picked",
        "small": "not picked",
        "grouped": "not eligible",
        "head": "not picked",
    }
    assert "FusedHead" in rows["head"][1]
    shown = _call(file, "--trt-log", log).stdout
    assert f"engine built elsewhere, by {log}" in " ".join(shown.split("\n"))
    assert "Sparse kernels: 1 picked, 2 not picked, 1 not eligible." in shown


def test_the_output_in_the_documents_is_the_real_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _graph(Path("model.onnx"))
    shutil.copy(LOGS / "trtexec-verbose.txt", "build.log")
    shown = _call("model.onnx", "--trt-log", "build.log").stdout
    _, title, table = shown.partition("engine built elsewhere")
    lines = [f"    {line}".rstrip() for line in f"{title}{table}".rstrip().split("\n")]
    assert "\n".join(lines) in (Path(__file__).parents[2] / "docs" / "engines.md").read_text()


def test_a_bundle_is_a_graph_too(made: Made) -> None:
    result = _call(made.sparse, "--trt-log", LOGS / "none-8-to-10.txt", "--json")
    document = json.loads(result.stdout)
    assert (result.exit_code, document["kind"]) == (0, "bundle")
    assert len(document["foreign"]["layers"]) == len(document["graph"]) > 1
    run = _call(made.sparse_run, "--trt-log", LOGS / "none-8-to-10.txt")
    assert (run.exit_code, "holds no ONNX graph" in " ".join(run.stderr.split())) == (2, True)


def test_the_json_of_layers_is_enough(tmp_path: Path) -> None:
    layers = tmp_path / "layers.json"
    layers.write_text(
        json.dumps(
            {
                "Layers": [
                    {"Name": "wide + relu1", "TacticName": "sm80_xmma_fprop_sparse_conv"},
                    {"Name": "small", "TacticName": "sm80_xmma_fprop_implicit_gemm"},
                    "head",
                ],
                "Bindings": ["x", "y"],
            }
        )
    )
    rows = _rows(_call(_graph(tmp_path / "m.onnx"), "--trt-layers", layers, "--json"))
    assert [rows[node][0] for node in ("wide", "small", "head")] == ["picked", "not picked", "unknown"]


def test_a_quantized_product_with_a_float_output_is_explained(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("[I] [TRT] (Sparsity) Chose 0 layer(s) using sparse tactics\n")
    state, text = _rows(_call(_quantized(tmp_path / "q.onnx"), "--trt-log", log, "--json"))["fc"]
    assert (state, "its output is not quantized" in text) == ("not picked", True)


def test_names_from_a_log_are_shown_as_text(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "[V] [TRT] Engine Layer Information:\n"
        "Layer(Conv): small, Tactic: 0x0, x[Half(1)] -> y[Half(1)]\n"
        "Layer(PluginV2): [red]evil\x07[/red], Tactic: 0x0, x[Half(1)] -> y[Half(1)]\n"
        "[V] [TRT] (Sparsity) something \x1b]0;title\x07 new\n"
    )
    shown = _call(_graph(tmp_path / "m.onnx"), "--trt-log", log).stdout
    assert "[red]evil\\x07[/red]" in shown
    assert "\x1b" not in shown
    assert "\x07" not in shown


@pytest.mark.parametrize(("content", "code"), [("hello\n", 6), (None, 2)])
@pytest.mark.parametrize("option", ["--trt-log", "--trt-layers"])
def test_files_of_something_else_end_with_6_and_missing_ones_with_2(
    option: str, content: str | None, code: int, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "file").write_text(content)
    assert _call(_graph(tmp_path / "m.onnx"), option, tmp_path / "file").exit_code == code


def test_without_a_graph_the_options_are_wrong_usage(tmp_path: Path) -> None:
    engine = tmp_path / "a.engine"
    engine.write_bytes(b"ftrt" + bytes(100))
    result = _call(engine, "--trt-log", LOGS / "trtexec-verbose.txt")
    assert (result.exit_code, "holds no ONNX graph" in " ".join(result.stderr.split())) == (2, True)
