"""Where it is sparse: the builder's log in both wordings, the inspector's JSON, and what follows for each
layer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_export.engines.tactics import engine_layers, kernels_from_inspection, read_sparsity
from sparse_export.formats.layers import EngineLayer, GraphLayer, Reason

TEXTS = Path(__file__).parent / "logs"


def _lines(name: str) -> list[str]:
    return (TEXTS / name).read_text().splitlines()


def _layer(node: str, eligible: Any = "yes", *codes: Any) -> GraphLayer:
    return GraphLayer(
        node=node,
        op_type="Conv",
        weight=f"{node}.weight",
        shape=(64, 64, 3, 3),
        reduction_axis=1,
        n_weights=36864,
        n_nonzero=18432,
        macs=None,
        nonzero_macs=None,
        eligible=eligible,
        reasons=tuple(Reason(code=code, text=f"Because of {code}.") for code in codes),
    )


def _rows(
    layers: list[GraphLayer],
    *,
    target: str = "tensorrt",
    sparse: bool = True,
    lines: Any = (),
    inspection: Any = None,
) -> dict[str, EngineLayer]:
    rows = engine_layers(layers, target=target, sparse=sparse, lines=lines, inspection=inspection)
    assert [row.node for row in rows] == [layer.node for layer in layers]
    return {row.node: row for row in rows}


# ---- the log


def test_the_wording_of_tensorrt_8_to_10_is_read() -> None:
    log = read_sparsity(_lines("wording-8-to-10.txt"))
    assert log.eligible == frozenset({"conv1", "relu1", "conv2", "conv3", "add3", "relu3", "fc"})
    assert log.picked == frozenset({"conv2", "conv3", "add3", "relu3"})
    assert (log.n_eligible, log.n_picked, log.unread) == (4, 2, ())


def test_the_later_wording_is_read() -> None:
    log = read_sparsity(_lines("wording-found-chose.txt"))
    assert log.eligible == frozenset({"conv1", "relu1", "conv2", "fc"})
    assert log.picked == frozenset({"conv2"})
    assert (log.n_eligible, log.n_picked, log.unread) == (3, 1, ())


def test_numbers_without_names_are_read() -> None:
    log = read_sparsity(
        [
            "(Sparsity) Found 39 layer(s) eligible to use sparse tactics",
            "(Sparsity) Chose 4 layer(s) using sparse tactics",
        ]
    )
    assert (log.eligible, log.n_eligible, log.picked, log.n_picked) == (frozenset(), 39, frozenset(), 4)


@pytest.mark.parametrize("name", ["none-8-to-10.txt", "none-found-chose.txt"])
def test_a_log_with_no_eligible_layer_is_read(name: str) -> None:
    log = read_sparsity(_lines(name))
    assert (log.eligible, log.picked, log.n_eligible, log.n_picked) == (frozenset(), frozenset(), 0, 0)


def test_a_log_that_says_nothing_of_sparsity_is_told_from_one_that_says_none() -> None:
    log = read_sparsity(["[I] Engine generation completed in 3.2 seconds.", ""])
    assert (log.eligible, log.picked, log.n_eligible, log.n_picked) == (None, None, None, None)


def test_lines_in_another_wording_are_kept_unread() -> None:
    log = read_sparsity(_lines("broken.txt"))
    assert log.eligible is None
    assert log.picked is None
    assert len(log.unread) == 4


def test_the_parts_of_a_network_add_up() -> None:
    lines = [*_lines("wording-found-chose.txt"), "(Sparsity) Chose 1 layer(s) using sparse tactics: other"]
    assert read_sparsity(lines).picked == frozenset({"conv2", "other"})


def test_a_region_of_many_nodes_names_none_of_them() -> None:
    line = "(Sparsity) Layers eligible for sparse math: {ForeignNode[conv1...fc]}, conv9"
    assert read_sparsity([line]).eligible == frozenset({"conv9"})


def test_layers_that_were_fused_side_by_side_are_told_apart() -> None:
    line = "(Sparsity) Layers eligible for sparse math: conv1 + relu1 || conv2 + relu2"
    assert read_sparsity([line]).eligible == frozenset({"conv1", "relu1", "conv2", "relu2"})


@given(st.lists(st.text()))
def test_no_text_breaks_the_reader(texts: list[str]) -> None:
    read_sparsity([*texts, *(f"(Sparsity) {text}" for text in texts)])


NAMES = st.text(st.characters(categories=["L", "N"], include_characters="_./"), min_size=1, max_size=12)


@given(st.lists(NAMES, unique=True))
def test_names_are_read_as_they_were_written(names: list[str]) -> None:
    old = read_sparsity([f"[I] [TRT] (Sparsity) Layers eligible for sparse math: {', '.join(names)}"])
    new = read_sparsity(
        [f"[V] (Sparsity) Found {len(names)} layer(s) eligible to use sparse tactics: {', '.join(names)}"]
    )
    assert old.eligible == new.eligible == frozenset(names)
    assert old.n_eligible == new.n_eligible == len(names)


# ---- the inspector


def _inspection(*layers: dict[str, Any] | str, bindings: str = "I/O Tensors") -> str:
    return json.dumps({"Layers": list(layers), bindings: ["input", "output"]})


SPARSE_KERNEL = "sm80_xmma_fprop_sparse_conv_f16f16_f16f16_f16_nhwckrsc_nhwc_tilesize128x128x64_stage3_g1"
DENSE_KERNEL = "sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc_nhwc_tilesize128x128x32_stage4"


@pytest.mark.parametrize("bindings", ["Bindings", "I/O Tensors"])
def test_kernels_are_read_as_tensorrt_10_and_11_write_them(bindings: str) -> None:
    layer = {"Name": "conv1 + relu1", "LayerType": "CaskConvolution", "TacticName": SPARSE_KERNEL}
    (kernels,) = kernels_from_inspection(_inspection(layer, bindings=bindings))
    assert kernels.nodes == {"conv1", "relu1"}
    assert kernels.sparse == (SPARSE_KERNEL,)


def test_a_region_tells_its_nodes_in_the_metadata() -> None:
    layer = {
        "Name": "__myl_Fc_myl0_1",
        "Metadata": "\x1e[ONNX Layer: fc1]\x1f[ONNX Layer: relu]",
        "TacticName": "sm90_xmma_sparse_gemm_f16f16",
    }
    (kernels,) = kernels_from_inspection(_inspection(layer))
    assert {"fc1", "relu"} <= kernels.nodes
    assert kernels.sparse


def test_a_layer_that_is_only_called_sparse_is_no_evidence() -> None:
    layer = {"Name": "sparse_head", "LayerType": "Convolution", "TacticName": DENSE_KERNEL}
    (kernels,) = kernels_from_inspection(_inspection(layer))
    assert kernels.sparse == ()


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{",
        "[]",
        "null",
        "3",
        '{"Layers": 3}',
        '{"Layers": ["conv1", null, 4]}',
        '{"Layers": [{"Name": 3, "TacticName": {}}]}',
        "[" * 100_000,
    ],
)
def test_a_text_that_tells_no_kernels_gives_none(text: str | None) -> None:
    assert all(one.names == () for one in kernels_from_inspection(text))


@given(
    st.text()
    | st.recursive(
        st.none() | st.text() | st.integers(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(st.sampled_from(["Layers", "Name", "TacticName", "Metadata"]), inner)
        ),
    ).map(json.dumps)
)
def test_no_text_breaks_the_reader_of_the_inspection(text: str) -> None:
    kernels_from_inspection(text)


# ---- what became of a layer


def test_the_log_says_who_was_picked_and_who_was_not() -> None:
    rows = _rows(
        [_layer("conv1"), _layer("conv2"), _layer("stem", "no", "indivisible")],
        lines=_lines("wording-8-to-10.txt"),
    )
    assert {node: row.state for node, row in rows.items()} == {
        "conv1": "not picked",
        "conv2": "picked",
        "stem": "not eligible",
    }
    assert "dense one was faster" in rows["conv1"].text
    assert rows["stem"].text == "Because of indivisible."


def test_a_layer_that_the_builder_does_not_count_is_not_picked() -> None:
    rows = _rows([_layer("elsewhere")], lines=_lines("wording-8-to-10.txt"))
    assert rows["elsewhere"].state == "not picked"
    assert "does not count it" in rows["elsewhere"].text


def test_a_kernel_of_the_inspector_is_proof() -> None:
    inspection = _inspection(
        {"Name": "conv1", "TacticName": SPARSE_KERNEL}, {"Name": "conv2", "TacticName": DENSE_KERNEL}
    )
    rows = _rows([_layer("conv1"), _layer("conv2")], inspection=inspection)
    assert (rows["conv1"].state, rows["conv1"].kernels) == ("picked", (SPARSE_KERNEL,))
    assert rows["conv2"].state == "unknown"


def test_a_kernel_that_serves_two_layers_proves_neither() -> None:
    inspection = _inspection({"Name": "a + b", "TacticName": SPARSE_KERNEL})
    assert {row.state for row in _rows([_layer("a"), _layer("b")], inspection=inspection).values()} == {
        "unknown"
    }


def test_the_builder_goes_before_the_graph() -> None:
    line = "(Sparsity) Chose 2 layer(s) using sparse tactics: a, b"
    rows = _rows([_layer("a", "no", "float32"), _layer("b", "unproven", "int8")], lines=[line])
    assert {row.state for row in rows.values()} == {"picked"}


@pytest.mark.parametrize("lines", [(), ["(Sparsity) something new"]])
def test_for_rtx_an_eligible_layer_is_unknown_and_never_picked(lines: list[str]) -> None:
    layers = [_layer("a"), _layer("b", "unproven", "int8"), _layer("c", "no", "groups-over")]
    rows = _rows(layers, target="tensorrt-rtx", lines=lines)
    assert {node: row.state for node, row in rows.items()} == {
        "a": "unknown",
        "b": "unproven",
        "c": "not eligible",
    }
    assert "byte for byte" in rows["a"].text


@pytest.mark.parametrize("name", ["none-8-to-10.txt", "none-found-chose.txt"])
def test_an_engine_without_any_sparse_kernel_says_so(name: str) -> None:
    assert _rows([_layer("a")], lines=_lines(name))["a"].state == "not picked"


def test_int8_is_unproven_until_the_log_says_more() -> None:
    layer = _layer("q", "unproven", "int8")
    assert _rows([layer])["q"].state == "unproven"
    assert (
        _rows([layer], lines=["(Sparsity) Chose 0 layer(s) using sparse tactics"])["q"].state == "not picked"
    )


def test_numbers_without_names_leave_a_layer_unknown() -> None:
    lines = [
        "(Sparsity) Found 2 layer(s) eligible to use sparse tactics",
        "(Sparsity) Chose 1 layer(s) using sparse tactics",
    ]
    assert _rows([_layer("a")], lines=lines)["a"].state == "unknown"


def test_without_the_flag_nothing_is_picked() -> None:
    row = _rows([_layer("a")], sparse=False)["a"]
    assert (row.state, row.text) == ("not picked", "The engine was built without sparse kernels.")
