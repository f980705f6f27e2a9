"""Layers of two engines of one graph are brought together by the nodes that they stand for."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from sparse_export.engines.matching import LayerGroup, match_layers
from sparse_export.engines.tactics import Kernels, kernels_from_inspection

NODES = ("conv1", "relu1", "conv2", "add", "fc")


def _kernels(**nodes: Sequence[str]) -> list[Kernels]:
    return [Kernels(layer=name, nodes=frozenset(found), names=()) for name, found in nodes.items()]


def _match(
    dense: Sequence[str],
    sparse: Sequence[str],
    dense_kernels: Sequence[Kernels] = (),
    sparse_kernels: Sequence[Kernels] = (),
) -> list[LayerGroup]:
    return list(
        match_layers(dense, sparse, dense_kernels=dense_kernels, sparse_kernels=sparse_kernels, nodes=NODES)
    )


def test_layers_of_one_name_are_matched_in_the_order_of_the_sparse_engine() -> None:
    found = _match(["conv1", "fc"], ["fc", "conv1"])
    assert found == [
        LayerGroup(nodes=("fc",), dense=("fc",), sparse=("fc",)),
        LayerGroup(nodes=("conv1",), dense=("conv1",), sparse=("conv1",)),
    ]


def test_layers_that_were_fused_otherwise_are_one_group() -> None:
    found = _match(["conv1 + relu1", "conv2 + add", "fc"], ["conv1", "relu1 + conv2", "add", "fc"])
    assert [(group.dense, group.sparse) for group in found] == [
        (("conv1 + relu1", "conv2 + add"), ("conv1", "relu1 + conv2", "add")),
        (("fc",), ("fc",)),
    ]


def test_a_reformat_is_counted_with_the_layer_that_it_is_for() -> None:
    reformat = "Reformatting CopyNode for Input Tensor 0 to conv1 + relu1"
    (group,) = _match(["conv1 + relu1"], [reformat, "conv1 + relu1"])
    assert group == LayerGroup(
        nodes=("conv1", "relu1"), dense=("conv1 + relu1",), sparse=(reformat, "conv1 + relu1")
    )


def test_nodes_are_known_from_the_metadata_of_a_layer_that_does_not_name_them() -> None:
    (group,) = _match(
        ["__myl_Fc_myl0_2"],
        ["sm90_fused"],
        _kernels(__myl_Fc_myl0_2=["fc"]),
        _kernels(sm90_fused=["fc", "add"]),
    )
    assert group == LayerGroup(nodes=("add", "fc"), dense=("__myl_Fc_myl0_2",), sparse=("sm90_fused",))


def test_kernels_that_are_only_numbered_are_never_matched_by_their_name() -> None:
    found = _match(["__myl_Move_myl0_1"], ["__myl_Move_myl0_1"])
    assert [(group.dense, group.sparse) for group in found] == [
        ((), ("__myl_Move_myl0_1",)),
        (("__myl_Move_myl0_1",), ()),
    ]


def test_the_inspectors_metadata_is_enough() -> None:
    text = '{"Layers": [{"Name": "kernel 7", "Metadata": "[ONNX Layer: conv1]\\u001e[ONNX Layer: relu1]"}]}'
    (kernels,) = kernels_from_inspection(text)
    assert kernels.layer == "kernel 7"
    (group,) = _match(["conv1 + relu1"], ["kernel 7"], sparse_kernels=[kernels])
    assert group.nodes == ("conv1", "relu1")


LAYERS = st.lists(st.lists(st.sampled_from(NODES), min_size=1, max_size=3).map(" + ".join), unique=True)


@given(dense=LAYERS, sparse=LAYERS)
def test_every_layer_is_in_one_group_and_no_node_in_two(dense: list[str], sparse: list[str]) -> None:
    found = _match(dense, sparse)
    assert sorted(name for group in found for name in group.dense) == sorted(dense)
    assert sorted(name for group in found for name in group.sparse) == sorted(sparse)
    nodes = [node for group in found for node in group.nodes]
    assert len(nodes) == len(set(nodes))
