"""What a log or JSON of an engine built elsewhere says of each layer, and the likely reason for a dense kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from sparse_export.engines.explain import NOT_ALLOWED, Explained, explain, nodes_with_float_output
from sparse_export.engines.foreign_log import BuilderLog, log_from_file
from sparse_export.formats.layers import EngineLayer, GraphLayer, Reason

LOG = Path(__file__).parent / "logs" / "trtexec-verbose.txt"


def _layer(node: str, n: int = 512, *codes: Any, eligible: Any = "yes") -> GraphLayer:
    return GraphLayer(
        node=node,
        op_type="Conv",
        weight=f"{node}.weight",
        shape=(n, n, 3, 3),
        reduction_axis=1,
        n_weights=9 * n * n,
        n_nonzero=9 * n * n // 2,
        macs=None,
        nonzero_macs=None,
        eligible=eligible,
        reasons=tuple(Reason(code=code, text=f"Because of {code}.") for code in codes),
    )


def _log(*lines: str, **other: Any) -> BuilderLog:
    values = {"layers": (), "verbose": True, "option": None, "low_precision": False, **other}
    return BuilderLog(sparsity_lines=lines, **values)


ELIGIBLE = "(Sparsity) Layers eligible for sparse math: {}"
PICKED = "(Sparsity) TRT inference plan picked sparse implementation for layers: {}"


def _row(layer: GraphLayer, log: BuilderLog | None = None, engine: Any = (), **other: Any) -> EngineLayer:
    (row,) = explain([layer], log=log, engine=engine, **other).layers
    assert (row.node, row.weight) == (layer.node, layer.weight)
    return row


def _explained_log() -> tuple[Explained, dict[str, EngineLayer]]:
    layers = [
        _layer("wide", 512, "float32", eligible="no"),
        _layer("small", 64),
        _layer("grouped", 64, "grouped", eligible="no"),
        _layer("head"),
    ]
    found = explain(layers, log=log_from_file(LOG), engine=())
    return found, {row.node: row for row in found.layers}


def test_a_verbose_log_explains_every_layer() -> None:
    found, rows = _explained_log()
    assert found.notes == ()
    assert {node: row.state for node, row in rows.items()} == {
        "wide": "picked",
        "small": "not picked",
        "grouped": "not eligible",
        "head": "not picked",
    }
    assert rows["wide"].kernels == ("sm80_xmma_fprop_sparse_conv_f16f16",)
    assert "a dense one was faster" in rows["small"].text
    assert "64 input and 64 output channels" in rows["small"].text
    assert rows["grouped"].text == "Because of grouped."
    assert "a plugin probably computes it (FusedHead)" in rows["head"].text


def test_a_large_layer_is_not_called_small() -> None:
    row = _row(_layer("a"), _log(ELIGIBLE.format("a"), PICKED.format("")))
    assert row.text == "The builder timed sparse kernels for it, and a dense one was faster."


def test_a_matmul_has_its_channels_on_the_last_axes() -> None:
    from dataclasses import replace

    matmul = replace(_layer("a"), op_type="MatMul", shape=(1, 768, 128), reduction_axis=1)
    assert (
        "768 input and 128 output channels"
        in _row(matmul, _log(ELIGIBLE.format("a"), PICKED.format(""))).text
    )


@pytest.mark.parametrize(
    ("log", "how"),
    [(_log(), "never mentions"), (_log(option="Disabled", verbose=False), "lists Sparsity: Disabled")],
)
def test_a_builder_that_was_not_allowed_sparse_kernels_is_told(log: BuilderLog, how: str) -> None:
    found = explain([_layer("a"), _layer("b", 64, "groups-over", eligible="no")], log=log, engine=())
    assert how in found.notes[0]
    assert [(row.state, row.text) for row in found.layers] == [
        ("not picked", NOT_ALLOWED),
        ("not eligible", "Because of groups-over."),
    ]


def test_a_log_that_is_not_verbose_does_not_blame_the_flag() -> None:
    found = explain([_layer("a")], log=_log(verbose=False), engine=())
    assert found.layers[0].state == "unknown"
    assert "not verbose" in found.notes[0]


def test_a_sparse_kernel_in_the_json_goes_before_a_log_that_says_nothing() -> None:
    row = _row(_layer("a"), _log(), [{"Name": "a", "TacticName": "sm80_xmma_sparse_gemm"}])
    assert row.state == "picked"


def test_a_dense_kernel_in_the_json_alone_is_told() -> None:
    row = _row(_layer("a", 64), None, [{"Name": "a || b", "TacticName": "sm80_xmma_gemm_f16f16"}])
    assert row.state == "not picked"
    assert "dense kernel: sm80_xmma_gemm_f16f16" in row.text
    assert "64 input" in row.text


def test_names_alone_leave_a_layer_unknown() -> None:
    assert _row(_layer("a"), None, [{"Name": "a + relu"}]).state == "unknown"


@pytest.mark.parametrize(
    "entry",
    [
        {"Name": "a", "Inputs": "Row major linear FP16 format"},
        {"Name": "a", "TacticName": "sm80_xmma_fprop_implicit_gemm_f16f16_f16f32"},
    ],
)
def test_a_float32_graph_that_was_built_in_16_bits_is_not_blamed_for_its_type(entry: dict[str, str]) -> None:
    assert _row(_layer("a", 512, "float32", eligible="no"), None, [entry]).state != "not eligible"


def test_a_float32_layer_that_stays_one_is_not_eligible() -> None:
    entry = {"Name": "a", "TacticName": "ampere_sgemm_128x64", "Inputs": "Row major linear FP32"}
    assert _row(_layer("a", 512, "float32", eligible="no"), None, [entry]).state == "not eligible"


@pytest.mark.parametrize(
    "region",
    [
        {"Name": "{ForeignNode[first...last]}", "LayerType": "Myelin"},
        {"Name": "{ForeignNode[first...last]}"},
        {"Name": "__myl_FcAdd_myl0_3", "LayerType": "kgen"},
    ],
)
def test_a_node_inside_a_region_is_told(region: dict[str, str]) -> None:
    assert f"inside {region['Name']}" in _row(_layer("a"), None, [region]).text
    rows = explain([_layer("a"), _layer("b")], log=None, engine=[region, {"Name": "b"}]).layers
    assert f"inside {region['Name']}" in rows[0].text


def test_a_plugin_that_names_the_node_is_told() -> None:
    row = _row(_layer("a"), None, [{"Name": "p", "LayerType": "PluginV3", "Metadata": "[ONNX Layer: a]"}])
    assert (row.state, "plugin layer p computes it" in row.text) == ("not picked", True)


def test_an_engine_of_another_graph_is_told() -> None:
    found = explain([_layer("a")], log=_log(ELIGIBLE.format("x"), PICKED.format("")), engine=())
    assert found.layers[0].state == "unknown"
    assert "built from another file" in found.notes[-1]


def test_a_node_without_a_name_goes_by_its_output() -> None:
    log = _log(ELIGIBLE.format("node_of_y"), PICKED.format("node_of_y"))
    assert _row(_layer("y"), log).state == "picked"


def test_a_reformat_says_nothing_of_the_layer_that_it_is_for() -> None:
    entry = {"Name": "Reformatting CopyNode for Input Tensor 0 to r + a", "TacticName": "copy"}
    assert _row(_layer("a"), None, [entry, {"Name": "a"}]).state == "unknown"


def test_forced_sparsity_and_unknown_wordings_are_told() -> None:
    notes = explain([_layer("a")], log=_log("(Sparsity) something new", option="Forced"), engine=()).notes
    assert "something new" in notes[0]
    assert "overwrote the weights" in notes[1]


def test_int8_without_an_int8_output_is_told_as_the_likely_reason() -> None:
    layer = _layer("a", 512, "int8", eligible="unproven")
    log = _log("(Sparsity) Chose 0 layer(s) using sparse tactics")
    assert "its output is not quantized" in _row(layer, log, float_output={"a"}).text
    assert "its output is not quantized" not in _row(layer, log).text
    unproven = _row(layer, None, [{"Name": "a"}], float_output={"a"})
    assert (unproven.state, "its output is not quantized" in unproven.text) == ("unproven", True)


def test_an_output_is_quantized_behind_fused_operators_by_all_its_users_or_not_at_all() -> None:
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w"], ["c"], name="good"),
        node("Relu", ["c"], ["r"]),
        node("QuantizeLinear", ["r", "s"], ["q"]),
        node("Conv", ["q", "w"], ["d"], name="half"),
        node("QuantizeLinear", ["d", "s"], ["e"]),
        node("Softmax", ["d"], ["f"]),
        node("MatMul", ["e", "w"], ["y"], name="last"),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    model: onnx.ModelProto = helper.make_model(helper.make_graph(nodes, "g", [], outputs))
    assert nodes_with_float_output(model) == {"half", "last"}
